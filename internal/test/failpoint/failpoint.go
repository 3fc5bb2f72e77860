// Package failpoint lets a test kill or pause the program at named points of an
// operation, and shift its clock.
//
// It does nothing unless it is built with the tag failpoints. With the tag, a
// process reads two environment variables. BIVOUAC_FAILPOINT has the form
// "ACTION POINT CHAT", for example "kill write-running:after
// 5f0e3b0e-1f1b-4a43-8a0e-6a7c2f9f5f11". The process then sends itself a signal
// at that point of an operation on that chat: SIGKILL if the action is kill,
// SIGSTOP if it is pause. The test has to continue a paused process with
// SIGCONT. BIVOUAC_CLOCK_OFFSET is a duration, for example "-150s". The process
// adds it to its machine's time.
//
// The package must never know what the points are for.
package failpoint
