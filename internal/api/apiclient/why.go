package apiclient

import (
	"context"
	"net/http"

	"github.com/google/uuid"

	"github.com/bivouac/bivouac/internal/api/wire"
)

// Why tells what became of the last sessions of the chat. If nothing is known, it returns
// an *Error with code wire.CodeNotFound.
func (c *Client) Why(ctx context.Context, chatID uuid.UUID) (wire.WhyAnswer, error) {
	var out wire.WhyAnswer
	_, err := c.call(ctx, request{method: http.MethodGet, path: sessionPath(chatID) + "/why"}, &out)
	return out, err
}
