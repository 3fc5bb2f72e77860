package auth

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json" // refuses duplicate names, and knows no others of another case
)

// maxToken is the maximum length of a token in bytes.
const maxToken = 8 << 10

// token is a parsed token.
type token struct {
	text      string
	algorithm jose.SignatureAlgorithm
	keyID     string         // may be empty
	claims    map[string]any // anybody's claims, until signedWith is true
}

// parseToken parses a token and verifies nothing.
func parseToken(text string) (*token, error) {
	parts := strings.SplitN(text, ".", 4)
	if len(parts) != 3 {
		return nil, errors.New("it is not a signed token in compact form")
	}
	header, err := parsePart(parts[0])
	if err != nil {
		return nil, fmt.Errorf("its header %w", err)
	}
	claims, err := parsePart(parts[1])
	if err != nil {
		return nil, fmt.Errorf("its payload %w", err)
	}
	if _, err := decodePart(parts[2]); err != nil {
		return nil, fmt.Errorf("its signature %w", err)
	}
	// crit and b64 change what the rest means. The others are keys of the sender's choice.
	for _, name := range []string{"crit", "b64", "jwk", "jku", "x5c", "x5u"} {
		if _, ok := header[name]; ok {
			return nil, fmt.Errorf("its header must not have %s", name)
		}
	}
	keyID, ok := header["kid"].(string)
	if _, has := header["kid"]; has && !ok {
		return nil, errors.New("its header has a kid that is not a string")
	}
	algorithm, _ := header["alg"].(string)
	if !slices.Contains(Algorithms(), algorithm) {
		return nil, errors.New("it is not signed with an allowed algorithm")
	}
	return &token{text, jose.SignatureAlgorithm(algorithm), keyID, claims}, nil
}

// signedWith reports whether a key verifies the token's signature.
func (t *token) signedWith(key jose.JSONWebKey) bool {
	signed, err := jose.ParseSignedCompact(t.text, []jose.SignatureAlgorithm{t.algorithm})
	if err != nil {
		return false
	}
	_, err = signed.Verify(key.Key)
	return err == nil
}

// parsePart parses the JSON object in a part of a token.
func parsePart(part string) (map[string]any, error) {
	text, err := decodePart(part)
	if err != nil {
		return nil, err
	}
	var object map[string]any
	if err := json.Unmarshal(text, &object); err != nil || object == nil || !utf8.Valid(text) {
		return nil, errors.New("is not a JSON object with distinct names")
	}
	return object, nil
}

// decodePart accepts one spelling for each value. The base64 package skips line ends.
func decodePart(part string) ([]byte, error) {
	text, err := base64.RawURLEncoding.Strict().DecodeString(part)
	if err != nil || strings.ContainsAny(part, "\r\n") {
		return nil, errors.New("is not base64url without padding")
	}
	return text, nil
}
