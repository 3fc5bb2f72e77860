package wire

import "time"

// TrailerEnd is the trailer of a log as text: the fields of [LogEnd], as "STATE" or
// "STATE: REASON". An answer without it is not complete.
const TrailerEnd = "Bivouac-End"

// LogFrame is a piece of a sandbox's output. It may begin and end in the middle of a line.
type LogFrame struct {
	Offset int64     `json:"offset"` // of its first byte, in bytes; see openapi.json
	Time   time.Time `json:"time"`   // when this server received it
	Data   string    `json:"data,omitempty"`
	// DataBase64 has the output instead of Data if that is not UTF-8.
	DataBase64 []byte `json:"data_base64,omitempty"`
}

// LogEndFrame is the last frame of a log. An answer without it is not complete.
type LogEndFrame struct {
	End LogEnd `json:"end"`
}

// LogEnd says how a session was at the end of its log.
type LogEnd struct {
	State  string `json:"state"`  // of the session, or what became of it: "deleted", "expired", "replaced", …
	Reason string `json:"reason"` // why; may be empty
}
