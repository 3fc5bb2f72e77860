package conformance_test

import (
	"sync"
	"sync/atomic"

	"github.com/bivouac/bivouac/runtime"
)

// fault is a wrong driver. Exactly the requirements in caught must fail for it.
type fault struct {
	name   string
	wrap   func(sound) runtime.Driver
	caught []string
}

// withoutAbilities wraps a sound driver without Logs, Exec and Explain.
func (f fault) withoutAbilities(d sound) runtime.Driver {
	driver := f.wrap(d)
	return struct {
		runtime.Driver
		runtime.Watcher
	}{driver, driver.(runtime.Watcher)}
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

// abilityFaults are wrong only in what a driver need not have.
func abilityFaults() []fault {
	return []fault{
		{"prints errors as output too", func(d sound) runtime.Driver { return repeats{d} }, []string{
			"keeps what a sandbox prints",
		}},
		{"counts offsets by chunk", func(d sound) runtime.Driver { return miscounts{d} }, []string{
			"keeps what a sandbox prints",
		}},
		{"drops its output at a stop", func(d sound) runtime.Driver { return tidies{d} }, []string{
			"keeps what a sandbox prints",
		}},
		{"reads all output from its beginning", func(d sound) runtime.Driver { return rewinds{d} }, []string{
			"reads output from an offset",
		}},
		{"does not wait for output", func(d sound) runtime.Driver { return looksOnce{d} }, []string{
			"follows what a sandbox prints",
		}},
		{"follows the dead", func(d sound) runtime.Driver { return mourns{d} }, []string{
			"follows what a sandbox prints",
		}},
		{"follows for nobody", func(d sound) runtime.Driver { return followsOn{d} }, []string{
			"follows only while somebody reads",
		}},
		{"has empty output of everything", func(d sound) runtime.Driver { return silent{d} }, []string{
			"has no output of the unknown",
		}},
		{"drops exit codes", func(d sound) runtime.Driver { return lenient{d} }, []string{
			"runs a command", "runs a command on a terminal", "runs many commands at a time",
		}},
		{"mixes errors into output", func(d sound) runtime.Driver { return mixes{d} }, []string{
			"runs a command",
		}},
		{"lets a command without input wait", func(d sound) runtime.Driver { return expectant{d} }, []string{
			"passes input to a command",
		}},
		{"passes no environment", func(d sound) runtime.Driver { return bare{d} }, []string{
			"runs a command in its environment",
		}},
		{"has terminals of one size", func(d sound) runtime.Driver { return rigid{d} }, []string{
			"runs a command on a terminal",
		}},
		{"runs one command at a time", func(d sound) runtime.Driver { return narrow{d, new(sync.Mutex)} }, []string{
			"runs many commands at a time",
		}},
		{"has exit codes of files that are not there", func(d sound) runtime.Driver { return shell{d} }, []string{
			"refuses a command that cannot run",
		}},
		{"leaves commands running", func(d sound) runtime.Driver { return walksOff{d} }, []string{
			"kills a command whose caller is gone",
		}},
		{"kills no children", func(d sound) runtime.Driver { return sparesChildren{d} }, []string{
			"kills a command whose caller is gone", "kills a command when it dies",
		}},
		{"has commands that outlive it", func(d sound) runtime.Driver { return bequeaths{d} }, []string{
			"kills a command when it dies",
		}},
		{"kills what a command left", func(d sound) runtime.Driver { return sweeps{d} }, []string{
			"leaves what a command left behind",
		}},
		{"forgets what a command left", func(d sound) runtime.Driver { return disowns{d} }, []string{
			"ends what a command left behind with the sandbox",
		}},
		{"explains no end", func(d sound) runtime.Driver { return discreet{d} }, []string{
			"explains what became of a sandbox",
		}},
		{"explains everything", func(d sound) runtime.Driver { return makesUp{d} }, []string{
			"explains only what it knows",
		}},
		{"has spares of no variant", func(d sound) runtime.Driver { return unvaried{d} }, []string{
			"starts a spare",
		}},
		{"has a new variant whenever it is asked", func(d sound) runtime.Driver { return moody{d, new(atomic.Int64)} }, []string{
			"starts a spare",
		}},
		{"starts spares without their pool", func(d sound) runtime.Driver { return unpools{d} }, []string{
			"starts a spare", "gives a spare to a chat", "claims only spares", "keeps claims over a restart",
		}},
		{"lists spares with a chat", func(d sound) runtime.Driver { return predicts{d} }, []string{
			"starts a spare", "gives a spare to a chat", "claims only spares", "keeps claims over a restart",
		}},
		{"claims without the chat", func(d sound) runtime.Driver { return anonymous{d} }, []string{
			"gives a spare to a chat", "runs commands in a claimed sandbox", "claims once however often it is asked", "refuses a second chat",
			"gives a spare to one of many", "ends what was claimed", "keeps claims over a restart",
		}},
		{"shows another chat than that of the claim", func(d sound) runtime.Driver { return confuses{d} }, []string{
			"gives a spare to a chat", "claims once however often it is asked", "refuses a second chat", "keeps claims over a restart",
		}},
		{"claims without the volume", func(d sound) runtime.Driver { return unbound{d} }, []string{
			"binds the volume of a claim", "runs commands in a claimed sandbox", "refuses a second chat",
			"gives a spare to one of many", "keeps claims over a restart",
		}},
		{"claims without a session file", func(d sound) runtime.Driver { return untold{d} }, []string{
			"binds the volume of a claim", "refuses a second chat", "gives a spare to one of many", "keeps claims over a restart",
		}},
		{"has a session file before a claim", func(d sound) runtime.Driver { return tellsEarly{d} }, []string{
			"binds the volume of a claim",
		}},
		{"tells commands the chat in their environment", func(d sound) runtime.Driver { return tellsCommands{d} }, []string{
			"runs commands in a claimed sandbox",
		}},
		{"hides the session file from commands", func(d sound) runtime.Driver { return hidesTheFile{d} }, []string{
			"runs commands in a claimed sandbox",
		}},
		{"claims only once", func(d sound) runtime.Driver { return claimsFirst{d} }, []string{
			"claims once however often it is asked", "keeps claims over a restart",
		}},
		{"gives a claimed sandbox to the next chat", func(d sound) runtime.Driver { return passesOn{d, new(sync.Mutex)} }, []string{
			"refuses a second chat", "gives a spare to one of many", "keeps claims over a restart",
		}},
		{"refuses a second chat and gives it its volume", func(d sound) runtime.Driver { return bindsFirst{d} }, []string{
			"refuses a second chat", "gives a spare to one of many", "keeps claims over a restart",
		}},
		{"looks before it claims", func(d sound) runtime.Driver { return races{d, new(sync.Mutex)} }, []string{
			"gives a spare to one of many",
		}},
		{"claims what was stopped", func(d sound) runtime.Driver { return claimsStopped{d} }, []string{
			"claims only spares",
		}},
		{"claims what has a chat", func(d sound) runtime.Driver { return claimsAny{d} }, []string{
			"claims only spares",
		}},
		{"claims by the beginning of an ID", func(d sound) runtime.Driver { return claimsPrefixes{d} }, []string{
			"claims only spares",
		}},
		{"claims the dead", func(d sound) runtime.Driver { return claimsDead{d} }, []string{
			"claims nothing that is dead",
		}},
		{"stops nothing that was claimed", func(d sound) runtime.Driver { return keepsClaimed{d} }, []string{
			"binds the volume of a claim", "ends what was claimed", "keeps claims over a restart",
		}},
		{"removes the volume with the claimed", func(d sound) runtime.Driver { return removesVolumes{d} }, []string{
			"ends what was claimed",
		}},
		{"forgets at a restart who has claimed", func(d sound) runtime.Driver { return forgetsClaims{d, new(sync.Map)} }, []string{
			"keeps claims over a restart",
		}},
	}
}
