// Package plugin makes a runtime driver a process of its own, by go-plugin.
package plugin
