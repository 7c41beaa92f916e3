// This file holds what the client was told, and what follows for later backends.

package deflate

import (
	"errors"
	"fmt"
)

// Agreement is what the client is told after the first handshake with a
// backend, and what binds every later one. The zero value is no compression. It
// is one byte, comparable, and all that needs to be kept of the handshake.
type Agreement struct {
	told terms
}

// Compressed reports whether messages on the connection may be compressed.
func (a Agreement) Compressed() bool { return a.told != 0 }

// Answer is the Sec-WebSocket-Extensions value for the client. If it is empty
// the header must not be sent.
func (a Agreement) Answer() string { return a.told.String() }

// Agrees returns nil if a backend whose handshake led to later can serve a
// client that was told a, and otherwise an error that says what differs. A
// backend may give more than was told, never less. The client goes by what it
// was told first: later is to be forgotten.
func (a Agreement) Agrees(later Agreement) error {
	switch {
	case !a.Compressed() && later.Compressed():
		return errors.New(extensionName + " was accepted, but the client was told that there is no compression")
	case a.Compressed() && !later.Compressed():
		return errDeclined
	case a.told.fresh() && !later.told.fresh():
		return fmt.Errorf("%s: the client was told %s, which is missing", extensionName, serverNoContext)
	case later.told.window() > a.told.window():
		return fmt.Errorf("%s: the client was told %s=%d, which is exceeded",
			extensionName, serverMaxWindow, a.told.window())
	default:
		return nil
	}
}

// Redial returns the negotiation for the next backend. It offers exactly what
// the client was told: with no compression nothing, and none of the client's
// other alternatives.
func (a Agreement) Redial() Negotiation {
	if !a.Compressed() {
		return Negotiation{}
	}
	return Negotiation{offered: [maxTerms]terms{a.told}, promised: true}
}
