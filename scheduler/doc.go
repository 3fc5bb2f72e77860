// Package scheduler is Bivouac's domain: sessions, and the use cases that give
// every chat one sandbox and never two.
//
// It decides; others act. Records and locks are reached through [Store] and
// [Locker], sandboxes through [runtime.Driver]. The package must never know of
// Nomad, Consul, HTTP or the command line.
//
// Every use case that changes something follows the same order: take the
// chat's lock and read the record in one step, write down what is about to be
// done, do it, write down that it is done. Whoever finds a record that says
// "about to" and can take its lock knows that the one who wrote it is gone, and
// undoes or finishes its work. Every write is fenced: it fails once the lock is
// no longer the writer's.
package scheduler
