package auth_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/internal/auth"
	"github.com/bivouac/bivouac/scheduler"
)

const address = "192.0.2.1:1234"

func TestStaticTokens(t *testing.T) {
	first, firstSum := auth.NewSecret()
	second, secondSum := auth.NewSecret()
	policies := []*scheduler.Policy{{Name: "p"}}
	a := auth.New([]auth.Token{{Name: "first", SHA256: firstSum, Policies: policies}, {Name: "second", SHA256: secondSum}}, nil)

	must.StrHasPrefix(t, "bvk_", first)
	must.Eq(t, sha256.Sum256([]byte(first)), firstSum)
	must.NotEq(t, first, second)

	caller, err := a.Authenticate(t.Context(), first, address)
	must.NoError(t, err)
	must.Eq(t, scheduler.Caller{Name: "first", Method: "token", Address: address, Policies: policies}, caller)
	caller, err = a.Authenticate(t.Context(), second, address)
	must.NoError(t, err)
	must.Eq(t, "second", caller.Name)

	for name, wrong := range map[string]string{
		"nothing": "", "half of it": first[:20], "more than it": first + "x", "in other letters": strings.ToUpper(first),
		"with a space": first + " ", "its checksum": fmt.Sprintf("%x", firstSum), "the name": "first",
	} {
		t.Run("refuses "+name, func(t *testing.T) {
			_, err := a.Authenticate(t.Context(), wrong, address)
			must.ErrorIs(t, err, scheduler.ErrUnauthenticated)
			if wrong != "" {
				must.StrNotContains(t, err.Error(), wrong)
			}
		})
	}
}

func TestFailedTriesAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		secret, sum := auth.NewSecret()
		a := auth.New([]auth.Token{{Name: "good", SHA256: sum}}, nil)
		fails := func(address string) (limited bool) {
			_, err := a.Authenticate(t.Context(), "wrong", address)
			_, limited = errors.AsType[*scheduler.LimitError](err)
			must.True(t, limited || errors.Is(err, scheduler.ErrUnauthenticated))
			return limited
		}
		for range 20 {
			must.False(t, fails(address))
		}
		must.True(t, fails(address))
		must.True(t, fails("192.0.2.1:9"), must.Sprint("another port is the same address"))
		must.False(t, fails("192.0.2.2:1234"))
		_, err := a.Authenticate(t.Context(), secret, address)
		must.NoError(t, err, must.Sprint("a good token from that address is served"))

		time.Sleep(time.Second)
		must.False(t, fails(address))
		must.True(t, fails(address))

		for range 20 {
			fails("[2001:db8::1]:1")
		}
		must.True(t, fails("[2001:db8::2]:1"), must.Sprint("one machine has many addresses of IPv6"))
		must.False(t, fails("[2001:db8:0:1::1]:1"))
	})
}

func TestManyAddressesAreForgotten(t *testing.T) {
	a := auth.New(nil, nil)
	for i := range 100_000 {
		_, err := a.Authenticate(t.Context(), "wrong", fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&255, i&255))
		must.ErrorIs(t, err, scheduler.ErrUnauthenticated)
	}
	must.LessEq(t, 4096, a.Remembered())
}

func BenchmarkStaticToken(b *testing.B) {
	secret, sum := auth.NewSecret()
	a := auth.New([]auth.Token{{Name: "good", SHA256: sum}}, nil)
	for b.Loop() {
		if _, err := a.Authenticate(b.Context(), secret, address); err != nil {
			b.Fatal(err)
		}
	}
}
