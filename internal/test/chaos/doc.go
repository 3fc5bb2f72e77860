// Command chaos breaks a running Bivouac under load, in every way that it is
// meant to survive, and reports whether it did.
//
// Three Consul servers, a Nomad server, two Nomad clients and three replicas
// run as processes of this machine; sandboxes are processes too. Workers
// create, get, renew, delete and clean up the sessions of some chats through
// all replicas, while faults come at random. The command compares the answers
// to callers with what really runs: it counts the processes of sandboxes in
// /proc, whatever any record says. At intervals the faults stop, and everything
// that was broken must settle within a limit. A reader at each replica follows
// the events through all faults. It must get each change of which callers were
// told, and no other, once and in order.
//
// A full run provokes each fault at least 20 times. Trouble of the suite itself
// ends the run and is reported differently from a violation.
//
// Faults, callers and pauses are drawn from a seed. Because the processes are
// real, the same seed repeats the draws but not the run.
//
// The replicas have a pool of spares, and each node has a helper, which gives a
// spare the volume of a chat. So some creates claim a spare and others start a
// sandbox. Faults kill and pause the helpers, kill and pause all spares, kill
// the leader while it fills the pool, and change the pool's size and the job
// template on one replica after the other. No spare may go to two chats, none
// may be left over, and no create may return one that does not answer. A claimed
// spare has its chat in its session file, not in its environment. This needs
// root. Without it there is no pool.
//
// Each replica reaches Consul and Nomad through a proxy. The proxy can hold
// back requests and answers, lose them or deliver them late. A node is cut off
// in two halves: its agent is paused, so that the servers count it as lost
// while its sandboxes live; and the Nomad server is paused, so that the agents
// live without servers. A failpoint shifts a replica's clock. This command uses
// no other failpoint; the tests of this package use those that kill and pause.
//
// Some faults are an operator's mistakes:
//
//   - A sandbox's task is restarted inside its allocation. The session must
//     then be dead, and the second run must end.
//   - A record is deleted. The sandbox must live and be adopted. If it was a spare and
//     a node helper fails in the same minute, its chat may get another one instead.
//   - The clock key is set a day ahead. No session may expire early.
//
// A second Bivouac of the same name runs beside the first one, with another
// prefix in Consul. Its sandboxes must survive everything, unless their node is
// lost.
//
// Package simulate tests what happens if the whole store is set back or wiped.
// Plugins are not part of this command: the tests of internal/pluginhost and
// examples show what their crashes leave behind.
//
// The command knows Bivouac by its API, its keys in Consul and its jobs in
// Nomad, as an operator does. It must never import the code that makes
// decisions in Bivouac.
package main
