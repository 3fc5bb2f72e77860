package command

import (
	"testing"

	"github.com/shoenig/test/must"
)

func TestWords_MayBeQuoted(t *testing.T) {
	for line, want := range map[string][]string{
		"":                             nil,
		" list ":                       {"list"},
		"create /srv/chat\t42":         {"create", "/srv/chat", "42"},
		`create "/srv/my chat" 42`:     {"create", "/srv/my chat", "42"},
		`create "/srv/\"my\" chat"`:    {"create", `/srv/"my" chat`},
		`create /srv/it's\"not"quoted`: {"create", `/srv/it's\"not"quoted`},
		`create ""`:                    {"create", ""},
	} {
		words, err := wordsOf(line)
		must.NoError(t, err)
		must.Eq(t, want, words, must.Sprint(line))
	}
	_, err := wordsOf(`create "/srv/my chat`)
	must.ErrorContains(t, err, "is no word in double quotes")
}
