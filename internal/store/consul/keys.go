package consul

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// shards is the number of folders that the records are spread over, so that a part of
// them can be read at a time. Consul has no paging.
const shards = 256

// keyspace is the prefix of all keys. It includes the version and ends in "/". These
// are the keys below it:
//
//	sessions/<shard>/<chat_id>       the record
//	locks/<shard>/<chat_id>          the chat's lock; exists while it is held
//	agents/<agent hash>/<chat_id>    index of all records
//	expiry/<minute>/<chat_id>        index of all records but those being created
//	flight/<chat_id>                 index of records being created or stopped
//	changed                          written with every record
//	clock                            the time that the replicas agree on
//	identity                         the Bivouac instance that all of this belongs to
type keyspace string

// plainPrefix matches a valid prefix without slashes at its ends. Consul's KV paths
// resolve "." and ".." and decode "%", but its transactions use keys as they are. So a
// prefix with these would mean two places.
var plainPrefix = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$`)

// maxPrefix bounds a prefix, in bytes. Consul accepts keys of 512 bytes.
const maxPrefix = 256

// newKeyspace returns the keys below a prefix, or below DefaultPrefix if it is empty.
func newKeyspace(prefix string) (keyspace, error) {
	// A leading slash would be dropped in a URL but not in a transaction.
	prefix = strings.Trim(cmp.Or(prefix, DefaultPrefix), "/")
	if len(prefix) > maxPrefix || !plainPrefix.MatchString(prefix) {
		return "", fmt.Errorf("invalid prefix of keys %q: use up to %d bytes of folder names with letters, digits, '_', '-' and '.'; a name must not begin with '.'", prefix, maxPrefix)
	}
	return keyspace(prefix + "/v1/"), nil
}

func (k keyspace) record(chatID uuid.UUID) string {
	return k.shard(shardOf(chatID)) + chatID.String()
}

func (k keyspace) lock(chatID uuid.UUID) string {
	return fmt.Sprintf("%slocks/%02x/%s", k, shardOf(chatID), chatID)
}

func (k keyspace) records() string { return string(k) + "sessions/" }

// folders returns the folders that a replica must be able to read, write and list.
// The first one is for all keys that are in no folder.
func (k keyspace) folders() []string {
	root := string(k)
	return []string{root, k.records(), root + "locks/", k.agents(), k.expiry(), k.flight()}
}

func (k keyspace) shard(n int) string { return fmt.Sprintf("%s%02x/", k.records(), n) }

func (k keyspace) agents() string { return string(k) + "agents/" }

func (k keyspace) agent(agentID string) string {
	sum := sha256.Sum256([]byte(agentID)) // an agent ID may contain any character, even "/"
	return k.agents() + hex.EncodeToString(sum[:16]) + "/"
}

func (k keyspace) expiry() string { return string(k) + "expiry/" }

func (k keyspace) bucket(bucket string) string { return k.expiry() + bucket + "/" }

func (k keyspace) flight() string { return string(k) + "flight/" }

func (k keyspace) changed() string { return string(k) + "changed" }

func (k keyspace) clock() string { return string(k) + "clock" }

func (k keyspace) identity() string { return string(k) + "identity" }

// shardOf returns a chat's shard. It spreads any kind of UUIDs evenly.
func shardOf(chatID uuid.UUID) int {
	return int(sha256.Sum256([]byte(chatID.String()))[0])
}

// bucketOf returns the name of t's minute. Names sort like their times.
func bucketOf(t time.Time) string { return t.UTC().Format("200601021504") }

// index returns the keys and values of a record's index entries. The value of the one
// below agents/ is the write's ID, so it changes with each write. A blocking list of
// an AI agent's sessions waits for that.
func (k keyspace) index(s *scheduler.Session, writeID string) map[string]string {
	if s == nil {
		return nil
	}
	chat := s.ChatID.String()
	entries := map[string]string{k.agent(s.AgentID) + chat: writeID}
	if s.State != scheduler.StateCreating {
		entries[k.bucket(bucketOf(s.ExpiresAt))+chat] = s.ExpiresAt.UTC().Format(time.RFC3339Nano)
	}
	if !s.Settled() {
		entries[k.flight()+chat] = string(s.State)
	}
	return entries
}

// chatOf returns the chat of a record's or index entry's key.
func chatOf(key string) (uuid.UUID, error) {
	name := key[strings.LastIndexByte(key, '/')+1:]
	chatID, err := uuid.Parse(name)
	if err != nil || chatID.String() != name {
		return uuid.Nil, fmt.Errorf("%w: %s: the key does not end in a chat ID", scheduler.ErrDamaged, key)
	}
	return chatID, nil
}
