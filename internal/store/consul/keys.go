package consul

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/scheduler"
)

// keyspace is the prefix of all keys. It includes the version and ends in "/". These
// are the keys below it:
//
//	sessions/<shard>/<chat_id>       the record
//	locks/<shard>/<chat_id>          the chat's lock; exists while it is held
//	agents/<agent hash>/<chat_id>    index of all records
//	expiry/<minute>/<chat_id>        index of all records but those being created
//	flight/<chat_id>                 index of records being created or stopped
//	warm/<session_id>/<chat_id>      index of records whose sandbox was a spare
//	spares/<session_id>              a spare
//	changed                          written with every record
//	events/<segment>/<write_id>      the changes of one transaction, see [changeLog]
//	events/head                      which segments there are
//	events/changed                   written with all changes
//	replicas/<consul_session>        a running replica; exists as long as its Consul session
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
	return []string{root, k.records(), root + "locks/", k.agents(), k.expiry(), k.flight(), k.warm(), k.spares(), k.events(), k.replicas()}
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

func (k keyspace) warm() string { return string(k) + "warm/" }

func (k keyspace) warmSession(sessionID uuid.UUID) string { return k.warm() + sessionID.String() + "/" }

func (k keyspace) spares() string { return string(k) + "spares/" }

func (k keyspace) spare(sessionID uuid.UUID) string { return k.spares() + sessionID.String() }

func (k keyspace) changed() string { return string(k) + "changed" }

func (k keyspace) events() string { return string(k) + "events/" }

func (k keyspace) eventsHead() string { return k.events() + "head" }

func (k keyspace) eventsChanged() string { return k.events() + "changed" }

func (k keyspace) segment(n uint64) string { return k.events() + strconv.FormatUint(n, 10) + "/" }

// segmentOf returns the number of the segment that a key is in.
func (k keyspace) segmentOf(key string) uint64 {
	name, _, _ := strings.Cut(strings.TrimPrefix(key, k.events()), "/")
	n, _ := strconv.ParseUint(name, 10, 64) // only keys below a segment are asked for
	return n
}

func (k keyspace) replicas() string { return string(k) + "replicas/" }

func (k keyspace) clock() string { return string(k) + "clock" }

func (k keyspace) identity() string { return string(k) + "identity" }

// shardOf returns a chat's shard, which is one of [scheduler.Shards] folders. Consul has
// no paging, so this lets a part of the records be read at a time. It spreads any kind of
// UUIDs evenly.
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
	if s.Warm {
		entries[k.warmSession(s.SessionID)+chat] = ""
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
