// Package scheduler is Bivouac's domain: sessions, and the use cases that give every
// chat one sandbox and never two.
//
// A [Scheduler] reaches records and locks through a [Store] and a [Locker], and
// sandboxes through a [runtime.Driver]. Every use case that changes something follows
// the same order: take the chat's lock and read the record in one step, write what it
// is about to do, do it, and write that it is done. If another replica finds a record
// that says "about to" and can take its lock, the writer is gone. Then that replica
// undoes or finishes the work. Every write fails once the writer has lost the lock.
//
// The package does not know Nomad, Consul, HTTP or the command line.
package scheduler
