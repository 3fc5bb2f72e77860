package conformance_test

import (
	"sync"

	"github.com/bivouac/bivouac/runtime"
)

// fault is a wrong driver. Exactly the requirements in caught must fail for it.
type fault struct {
	name   string
	wrap   func(sound) runtime.Driver
	caught []string
}

func faults() []fault {
	return []fault{
		{"has no proper name", func(d sound) runtime.Driver { return nameless{d} }, []string{
			"says who it is",
		}},
		{"tells stages twice", func(d sound) runtime.Driver { return shouts{d} }, []string{
			"creates a sandbox that answers",
		}},
		{"keeps the access token from the sandbox", func(d sound) runtime.Driver { return secretive{d} }, []string{
			"hands over the access token",
		}},
		{"makes a second sandbox", func(d sound) runtime.Driver { return doubles{d} }, []string{
			"creates once however often it is asked", "outlives a restart",
		}},
		{"takes another spec", func(d sound) runtime.Driver { return takesAnySpec{d} }, []string{
			"refuses another spec for the same ID",
		}},
		{"gives all sandboxes one name", func(d sound) runtime.Driver { return namesakes{d} }, []string{
			"creates many at a time",
		}},
		{"does not know at its first look", func(d sound) runtime.Driver { return looksTwice{d, new(sync.Map)} }, []string{
			"creates a sandbox that answers", "may be inspected while it starts", "stops for good", "leaves others alone",
			"lets a stop overtake a create", "outlives a restart",
		}},
		{"trims what it passes on", func(d sound) runtime.Driver { return trims{d} }, []string{
			"carries odd names unharmed",
		}},
		{"takes no long names", func(d sound) runtime.Driver { return cuts{d} }, []string{
			"takes the longest names",
		}},
		{"stops in name alone", func(d sound) runtime.Driver { return stopsInName{d} }, []string{
			"stops for good", "deletes without a trace", "leaves others alone", "lets a stop overtake a create", "outlives a restart",
		}},
		{"lets a create come after a stop", func(d sound) runtime.Driver { return restarts{d} }, []string{
			"stops for good", "stops what it has never seen", "lets a stop overtake a create", "outlives a restart",
		}},
		{"fails to stop the unknown", func(d sound) runtime.Driver { return neverStopped{d} }, []string{
			"stops what it has never seen", "leaves others alone", "outlives a restart",
		}},
		{"forgets what it deleted", func(d sound) runtime.Driver { return reopens{d} }, []string{
			"deletes without a trace", "stops what it has never seen", "leaves nothing of a create that was given up",
			"outlives a restart", "leaks nothing when it dies in a create", "reports a sandbox that fails",
		}},
		{"finds by the beginning of an ID", func(d sound) runtime.Driver { return findsPrefixes{d} }, []string{
			"does not find what is not there",
		}},
		{"stops by the beginning of an ID", func(d sound) runtime.Driver { return stopsPrefixes{d} }, []string{
			"leaves others alone",
		}},
		{"does not tell that a create was given up", func(d sound) runtime.Driver { return swallows{d} }, []string{
			"leaves nothing of a create that was given up",
		}},
		{"lists none that run", func(d sound) runtime.Driver { return listsTheDead{d} }, []string{
			"creates a sandbox that answers", "creates many at a time", "ends a list early", "outlives a restart", "leaks nothing when it dies in a create",
		}},
		{"lists on when nobody looks", func(d sound) runtime.Driver { return insists{d} }, []string{
			"ends a list early",
		}},
		{"says not why a sandbox died", func(d sound) runtime.Driver { return mute{d} }, []string{
			"stops for good", "sees a sandbox die", "outlives a restart",
		}},
		{"forgets its sandboxes at a restart", func(d sound) runtime.Driver { return forgets{d, new(sync.Map)} }, []string{
			"outlives a restart",
		}},
		{"writes down what it made when it is asked again", func(d sound) runtime.Driver { return writesLate{d, new(pending)} }, []string{
			"leaks nothing when it dies in a create",
		}},
		{"takes a failure for an outage", func(d sound) runtime.Driver { return blamesOthers{d} }, []string{
			"reports a sandbox that fails",
		}},
		{"says ready before the sandbox answers", func(d sound) runtime.Driver { return hasty{d} }, []string{
			"reports a sandbox that fails", "gives up on a slow sandbox",
		}},
		{"lists all there is", func(d sound) runtime.Driver { return listsAll{d} }, []string{
			"leaves what is not its own alone",
		}},
		{"ends what is not its own", func(d sound) runtime.Driver { return endsAny{d} }, []string{
			"leaves what is not its own alone",
		}},
		{"shows what is not its own", func(d sound) runtime.Driver { return showsAny{d} }, []string{
			"leaves what is not its own alone",
		}},
		{"hands out what is not its own", func(d sound) runtime.Driver { return takesOver{d} }, []string{
			"leaves what is not its own alone",
		}},
	}
}

func slowFaults() []fault {
	return []fault{
		{"takes no notice of a death", func(d sound) runtime.Driver { return optimist{d, new(sync.Map)} }, []string{
			"sees a sandbox die",
		}},
		{"misses deaths", func(d sound) runtime.Driver { return asleep{d} }, []string{
			"reports a death to a watcher",
		}},
		{"goes on behind the wire when nobody waits for it", func(d sound) runtime.Driver { return deaf{d, new(sync.Map)} }, []string{
			"gives up on a slow sandbox",
		}},
		{"waits on when nobody waits for it", func(d sound) runtime.Driver { return stubborn{d} }, []string{
			"gives up on a slow sandbox",
		}},
	}
}
