package command

import (
	"flag"
	"strings"

	"github.com/posener/complete"
)

// AutocompleteFlags tells a shell which options there are, and what follows
// them.
func (c *command) AutocompleteFlags() complete.Flags {
	all := complete.Flags{}
	c.flags.VisitAll(func(f *flag.Flag) { all["-"+f.Name] = predict(f) })
	return all
}

// predict tells what an option's value may be, by its name in the help.
func predict(f *flag.Flag) complete.Predictor {
	switch name, _ := flag.UnquoteUsage(f); {
	case name == "":
		return complete.PredictNothing // it takes none
	case strings.Contains(name, "FILE"):
		return complete.PredictFiles("*")
	case name == "FOLDER" || name == "PATH":
		return complete.PredictDirs("*")
	default:
		return complete.PredictAnything
	}
}

// AutocompleteArgs tells a shell what the arguments may be.
func (c *command) AutocompleteArgs() complete.Predictor {
	if c.args == "PLUGIN" {
		return complete.PredictFiles("*")
	}
	return complete.PredictNothing
}
