package scheduler

import (
	"context"
	"time"
)

// Caller identifies who requested an operation, and what it may do.
type Caller struct {
	// Name is the name of the caller's token, or the subject of its JWT. It becomes
	// the owner of the sessions that the caller creates.
	Name string
	// Method says how the caller was authenticated: "token", or "jwt/NAME". It is
	// empty without authentication.
	Method string
	// Accessor is a public ID of the credential, such as a JWT's jti. It may be empty.
	Accessor string
	// Address is where the request came from, as HOST:PORT. It may be empty.
	Address string
	// Expires is when the caller's credential ends. Zero means never.
	Expires time.Time
	// Policies say what the caller may do. Nil means everything: there is no
	// authentication, or it is background work.
	Policies []*Policy
}

// Key tells the caller from others, for limits. A token and the subject of a JWT may have
// the same name.
func (c Caller) Key() string { return c.Method + " " + c.Name }

// DefaultOwner is the name of a caller that has none, and the owner of sessions
// from before owners were recorded.
const DefaultOwner = "anonymous"

// backgroundName is the name of the caller of background work.
const backgroundName = "bivouac"

// background returns the caller of background work.
func background() Caller { return Caller{Name: backgroundName} }

// IsReservedName reports whether no authenticated caller may have a name, because it
// means nobody or Bivouac itself.
func IsReservedName(name string) bool { return name == DefaultOwner || name == backgroundName }

type (
	callerKey    struct{}
	requestIDKey struct{}
)

// WithCaller returns a context that carries the caller.
func WithCaller(ctx context.Context, caller Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// CallerFrom returns the caller that ctx carries. Without one its name is
// [DefaultOwner], and it may do everything.
func CallerFrom(ctx context.Context) Caller {
	if caller, ok := ctx.Value(callerKey{}).(Caller); ok {
		return caller
	}
	return Caller{Name: DefaultOwner}
}

// WithRequestID returns a context that carries the ID of a request.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, id)
}

// RequestIDFrom returns the request ID that ctx carries, or "".
func RequestIDFrom(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}
