package credentials

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	must.NoError(t, os.WriteFile(path, []byte(text), 0o600))
}

func openToken(t *testing.T, text string) (token *Token, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "token")
	write(t, path, text)
	token, err := TokenFile(path)
	must.NoError(t, err)
	return token, path
}

func TestToken(t *testing.T) {
	t.Run("has a fixed value", func(t *testing.T) {
		token := NewToken("secret")
		changed, err := token.Reload()
		must.NoError(t, err)
		must.False(t, changed)
		must.Eq(t, "secret", token.Value())
		_, ok := token.Newer("secret")
		must.False(t, ok)
	})
	t.Run("is read from a file without the newline at its end", func(t *testing.T) {
		token, _ := openToken(t, "first\r\n")
		must.Eq(t, "first", token.Value())
		changed, err := token.Reload()
		must.NoError(t, err)
		must.False(t, changed)
	})
	t.Run("changes when the file is rewritten in place", func(t *testing.T) {
		token, path := openToken(t, "first\n")
		write(t, path, "second\n")
		changed, err := token.Reload()
		must.NoError(t, err)
		must.True(t, changed)
		must.Eq(t, "second", token.Value())
	})
	t.Run("changes when another file takes the place of its file", func(t *testing.T) {
		token, path := openToken(t, "first\n")
		write(t, path+".new", "second\n")
		must.NoError(t, os.Rename(path+".new", path))
		changed, err := token.Reload()
		must.NoError(t, err)
		must.True(t, changed)
		must.Eq(t, "second", token.Value())
	})
	t.Run("waits until a half-written file is complete", func(t *testing.T) {
		token, path := openToken(t, "first\n")
		synctest.Test(t, func(t *testing.T) {
			write(t, path, "seco")
			reloaded := make(chan error)
			go func() {
				_, err := token.Reload()
				reloaded <- err
			}()
			synctest.Wait() // until it waits for the file to stay the same
			must.Eq(t, "first", token.Value())
			write(t, path, "second\n")
			must.NoError(t, <-reloaded)
			must.Eq(t, "second", token.Value())
		})
	})
	t.Run("stays if the file cannot be used", func(t *testing.T) {
		for name, tc := range map[string]struct {
			harm func(t *testing.T, path string)
			told string
		}{
			"empty":     {func(t *testing.T, path string) { write(t, path, "") }, "is empty"},
			"blank":     {func(t *testing.T, path string) { write(t, path, "\n \n") }, "is empty"},
			"removed":   {func(t *testing.T, path string) { must.NoError(t, os.Remove(path)) }, "no such file"},
			"too large": {func(t *testing.T, path string) { write(t, path, strings.Repeat("x", maxToken+1)) }, "is larger than"},
			"two lines": {func(t *testing.T, path string) { write(t, path, "s3cret\ns3cret") }, "must contain one token"},
		} {
			t.Run(name, func(t *testing.T) {
				token, path := openToken(t, "first\n")
				tc.harm(t, path)
				changed, err := token.Reload()
				must.ErrorContains(t, err, tc.told)
				must.ErrorContains(t, err, path)
				must.StrNotContains(t, err.Error(), "s3cret")
				must.False(t, changed)
				must.Eq(t, "first", token.Value())
			})
		}
	})
	t.Run("must be there at the start", func(t *testing.T) {
		_, err := TokenFile(filepath.Join(t.TempDir(), "missing"))
		must.ErrorIs(t, err, os.ErrNotExist)
	})
}

func TestNewer(t *testing.T) {
	t.Run("reads the file again if the current value was refused", func(t *testing.T) {
		token, path := openToken(t, "first")
		write(t, path, "second")
		value, ok := token.Newer("first")
		must.True(t, ok)
		must.Eq(t, "second", value)
		must.Eq(t, "second", token.Value())
	})
	t.Run("returns the current value if an older one was refused", func(t *testing.T) {
		token, path := openToken(t, "first")
		must.NoError(t, os.Remove(path))
		value, ok := token.Newer("older")
		must.True(t, ok)
		must.Eq(t, "first", value)
	})
	t.Run("reads the file at most once per second", func(t *testing.T) {
		token, path := openToken(t, "first")
		synctest.Test(t, func(t *testing.T) {
			_, ok := token.Newer("first")
			must.False(t, ok)
			write(t, path, "second")
			_, ok = token.Newer("first")
			must.False(t, ok)
			time.Sleep(newerEvery)
			_, ok = token.Newer("first")
			must.True(t, ok)
		})
	})
}
