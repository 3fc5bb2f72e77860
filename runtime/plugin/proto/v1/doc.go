// Package runtimev1 is the generated code of the plugin protocol, version 1.
// Package plugin speaks it; nothing else should need to.
package runtimev1
