// Package handshake is the opening handshake of RFC 6455 §4 between a client, the
// proxy and a backend: what a client's request must be, what goes to the backend,
// and what its answer must be before a tunnel is opened.
//
// It holds no connection and starts no goroutine: who dials decides how long.
package handshake

import (
	"crypto/sha1" //nolint:gosec // RFC 6455 §4.2.2 wants it; nothing secret depends on it
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"

	"golang.org/x/net/http/httpguts"
)

// Refusal is why a client's handshake is refused before any backend is dialed.
type Refusal struct {
	Status int
	Header http.Header // to be added to the answer; may be nil
	Err    error
}

// IsUpgrade reports whether r asks for a WebSocket over HTTP/1.1 (RFC 6455 §4.1).
// Whatever else is wrong with such a request is for Check to say.
func IsUpgrade(r *http.Request) bool {
	return r.ProtoMajor == 1 && r.ProtoMinor >= 1 &&
		httpguts.HeaderValuesContainsToken(r.Header["Upgrade"], "websocket") &&
		httpguts.HeaderValuesContainsToken(r.Header["Connection"], "upgrade")
}

// Check returns why an upgrade request must be refused (RFC 6455 §4.2.1), or nil.
func Check(r *http.Request, allowed Origins) *Refusal {
	no := check(r, allowed)
	if no != nil && hasBody(r) {
		// Else net/http would first wait for a body that may never come.
		no.Header.Set("Connection", "close")
	}
	return no
}

func check(r *http.Request, allowed Origins) *Refusal {
	switch {
	case r.Method != http.MethodGet:
		return refuse(http.StatusMethodNotAllowed, "a WebSocket handshake must be a GET", "Allow", http.MethodGet)
	case hasBody(r):
		// What follows such a request belongs to its body, not to the tunnel.
		return refuse(http.StatusBadRequest, "a WebSocket handshake must not have a body")
	case !exactly(r.Header["Sec-Websocket-Version"], "13"):
		// RFC 9110 §15.5.22 wants Upgrade in it.
		return refuse(http.StatusUpgradeRequired, "unsupported WebSocket version",
			"Sec-WebSocket-Version", "13", "Upgrade", "websocket", "Connection", "Upgrade")
	case !validKey(r.Header["Sec-Websocket-Key"]):
		return refuse(http.StatusBadRequest, "missing or malformed Sec-WebSocket-Key")
	case !allowed.allow(r):
		return refuse(http.StatusForbidden, fmt.Sprintf("origin %q is not allowed", r.Header["Origin"]))
	}
	return nil
}

// AcceptKey is the Sec-WebSocket-Accept that answers a key (RFC 6455 §4.2.2).
func AcceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // see the import
	return base64.StdEncoding.EncodeToString(sum[:])
}

func refuse(status int, text string, header ...string) *Refusal {
	h := make(http.Header)
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &Refusal{Status: status, Header: h, Err: errors.New(text)}
}

// hasBody reports whether a body was declared, by length or as chunked.
func hasBody(r *http.Request) bool {
	return r.ContentLength != 0 || len(r.TransferEncoding) > 0
}

func exactly(values []string, want string) bool {
	return len(values) == 1 && values[0] == want
}

// validKey reports whether there is one key, of 16 bytes in base64.
func validKey(values []string) bool {
	if len(values) != 1 {
		return false
	}
	key, err := base64.StdEncoding.DecodeString(values[0])
	return err == nil && len(key) == 16
}
