package scheduler

import "context"

// Caller identifies who requested an operation.
type Caller struct {
	Name string
}

// DefaultOwner is the name of a caller that has none, and the owner of sessions
// from before owners were recorded.
const DefaultOwner = "anonymous"

// background returns the caller of background work.
func background() Caller { return Caller{Name: "bivouac"} }

type (
	callerKey    struct{}
	requestIDKey struct{}
)

// WithCaller returns a context that carries the caller.
func WithCaller(ctx context.Context, caller Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// CallerFrom returns the caller that ctx carries. Without one its name is
// [DefaultOwner].
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
