package scheduler

import "context"

// Caller is who asks for a use case.
type Caller struct {
	Name string
}

// background is the caller of all work that nobody asked for.
var background = Caller{Name: "bivouac"}

type (
	callerKey    struct{}
	requestIDKey struct{}
)

// WithCaller returns a context for the use cases that the caller asks for.
func WithCaller(ctx context.Context, caller Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

// CallerFrom returns the caller of WithCaller, or "bivouac" if there is none.
func CallerFrom(ctx context.Context) Caller {
	if caller, ok := ctx.Value(callerKey{}).(Caller); ok {
		return caller
	}
	return background
}

// WithRequestID returns a context for what is done for one request.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, id)
}

// RequestIDFrom returns the ID of WithRequestID, or "" if there is none.
func RequestIDFrom(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}
