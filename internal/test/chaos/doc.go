// Command chaos breaks a running Bivouac in every way that it is meant to
// stand, under load, and says whether it did.
//
// Three Consul servers, a Nomad server, two Nomad clients and three replicas run
// as processes of this machine; sandboxes are processes too. Workers create, get,
// renew, delete and clean up sessions of some chats through all replicas, while
// faults come at random. What the callers are told is held against what runs:
// the processes of sandboxes are counted in /proc, whatever any record says. At
// intervals the faults stop, and what was broken has to settle within a limit.
//
// A full run has each fault at least 20 times. Whatever keeps the suite itself from
// going on ends the run, and is told apart from what did not hold.
//
// Faults, callers and pauses are drawn from a seed. As real processes run, the
// same seed gives the same draws and not the same run.
//
// A replica is cut off from Consul or Nomad by a proxy that it reaches them
// through, which holds back requests and answers, loses them, or lets them arrive
// late. A node is cut off in two halves: its agent is paused, so that the servers
// take it for lost while its sandboxes live; and the Nomad server is paused, so
// that the agents live without servers. A replica's clock is set off by a failpoint,
// the only one that this command uses; the tests of this package use those that kill
// and pause.
//
// Some faults are an operator's mistakes: a sandbox's task is restarted inside its
// allocation, after which the session must be dead and the second run must end; a
// record is deleted, after which the sandbox must live and be adopted; the clock key
// is set a day ahead, after which no session may expire early. A second Bivouac of
// the same name runs beside the first one, below another prefix in Consul. Its
// sandboxes must live through all of it, unless their node is lost.
//
// That the whole store is set back or wiped is left to package simulate.
//
// Plugins are not part of it: what their crashes leave is shown by the tests of
// internal/pluginhost and examples.
//
// It knows Bivouac by its API, its keys in Consul and its jobs in Nomad, as an
// operator does, and must never import what makes decisions there.
package main
