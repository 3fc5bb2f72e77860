// Package simulate runs replicas of Bivouac through seeded simulations: the real
// scheduler with its background work, the real Consul store and the real Nomad
// driver, over models of Consul and Nomad in memory, in simulated time.
//
// A seed decides what callers ask, what goes wrong and when, and in what order
// all of it happens. Each run checks at every step that no chat has two live
// processes, that what callers were told fits together (is linearizable), and
// that some time after the last fault nothing is left over.
//
// Some faults change the store as an operator or a restored snapshot does: one
// record is deleted, all records are set back, the store is wiped. Callers may then
// be told anything of the chats that lost their records, so that what they are told
// is not checked. Two processes of a chat are never allowed, and everything must
// settle, within 3 minutes. These faults spare starts that are in flight.
//
// In a third of the runs another Bivouac of the same name has a sandbox on the same
// Nomad. It must be left alone, and callers must never be told of it.
//
// All of it is tests. The package must never hold anything that the product
// needs.
package simulate
