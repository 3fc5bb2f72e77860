package consul

import (
	"strings"
	"testing"

	"github.com/shoenig/test/must"

	"github.com/bivouac/bivouac/scheduler"
)

func TestEntriesAreWhatAWriteLeaves(t *testing.T) {
	c := open(t)
	r := c.join(t, c.addr)
	for _, state := range scheduler.States() {
		session := freshSession()
		session.State = state
		put(t, r, session)
		pairs, err := Entries(c.prefix, session)
		must.NoError(t, err)
		var keys []string
		for _, pair := range pairs {
			keys = append(keys, pair.Key)
		}

		left, _, err := c.client.KV().Keys(c.prefix, "", nil)
		must.NoError(t, err)
		var written []string
		for _, key := range left {
			if strings.HasSuffix(key, session.ChatID.String()) {
				written = append(written, key)
			}
		}
		must.SliceContainsAll(t, written, keys, must.Sprint(state))

		decoded, _, err := decodeRecord(pairs[0].Key, session.ChatID, pairs[0].Value)
		must.NoError(t, err)
		must.Eq(t, read(t, r, session.ChatID), decoded)
		for _, pair := range pairs[1:] {
			stored, _, err := c.client.KV().Get(pair.Key, nil)
			must.NoError(t, err)
			if !strings.HasPrefix(pair.Key, r.keys.agents()) { // there it is the ID of the write
				must.Eq(t, string(stored.Value), string(pair.Value))
			}
		}
	}

	unknown := freshSession()
	unknown.State = "unknown"
	_, err := Entries(c.prefix, unknown)
	must.ErrorIs(t, err, scheduler.ErrInvalid)
}
