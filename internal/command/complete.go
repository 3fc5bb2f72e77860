package command

import (
	"flag"
	"strings"

	"github.com/posener/complete"
)

// AutocompleteFlags returns the command's options, and what can follow each of them.
func (c *command) AutocompleteFlags() complete.Flags {
	all := complete.Flags{}
	c.flags.VisitAll(func(f *flag.Flag) { all["-"+f.Name] = predict(f) })
	return all
}

// predict returns the possible values of an option, by the value's name in the help.
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

// AutocompleteArgs returns the possible arguments.
func (c *command) AutocompleteArgs() complete.Predictor {
	if c.args == "PLUGIN" {
		return complete.PredictFiles("*")
	}
	return complete.PredictNothing
}
