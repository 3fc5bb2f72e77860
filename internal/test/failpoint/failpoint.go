// Package failpoint names the places in an operation where a test may have the
// program killed or paused, and the clock that a test may set wrong.
//
// It does nothing unless it is built with the tag failpoints. Then a process whose
// environment has BIVOUAC_FAILPOINT set to "ACTION POINT CHAT", such as
// "kill write-running:after 5f0e3b0e-1f1b-4a43-8a0e-6a7c2f9f5f11", does that to
// itself at that point of an operation on that chat: kill is SIGKILL, pause is
// SIGSTOP, which somebody else has to end by SIGCONT. And a process whose
// environment has BIVOUAC_CLOCK_OFFSET set to a duration, such as "-150s", takes
// the time to be that much later.
//
// It must never know what the places are for.
package failpoint
