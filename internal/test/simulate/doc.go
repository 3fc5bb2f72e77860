// Package simulate runs replicas of Bivouac through seeded simulations in
// simulated time. The scheduler with its background work, the Consul store and
// the Nomad driver are the real ones; Consul and Nomad are models in memory.
//
// The seed decides what callers ask, what goes wrong and when, and in what
// order everything happens. Each run checks four things: at every step, that
// no chat has two live processes; that the answers to callers are linearizable;
// that nothing is left over some time after the last fault; and that the stored
// changes tell what happened, the same to a reader at each replica.
//
// Some faults change the store as an operator or a restored snapshot does: they
// delete one record, set all records back, or wipe the store. Answers about the
// chats that lost their records are then not checked, because any answer is
// possible. Two processes of one chat are still never allowed, and everything
// must settle within 3 minutes. These faults do not touch starts that are in
// flight.
//
// In half of the runs there is a pool of spares, with a model of the node helper that
// gives a spare its chat's volume. No spare may be given twice, at any time, and none that
// does not answer. The pool must be full again in the end. There is one known exception to
// two processes of a chat: if a claimed sandbox loses its record by hand, only its node's
// helper knows its chat. A replica that has not heard of the claim, because the helper failed
// or has only just bound the sandbox, may start another one. Such sandboxes are counted.
//
// In a third of the runs another Bivouac of the same name has a sandbox on the
// same Nomad. Bivouac must leave it alone and must never report it to callers.
//
// The package contains only tests. It must never hold anything that the product
// needs.
package simulate
