// This file holds the package's rules and the setting that chooses among them.

// Package deflate rewrites the permessage-deflate handshake (RFC 7692) so that
// any other backend can take over a connection whose messages are compressed.
// Nothing is ever decompressed: only the Sec-WebSocket-Extensions offer to the
// backend and the answer to the client change.
//
// Invariants:
//
//   - Every compressed message of the client stands alone: each answer to the
//     client has client_no_context_takeover, exactly once. RFC 7692 section
//     7.1.1.2 allows it in an answer whether or not it was offered.
//   - The client's window is its own affair: client_max_window_bits is not
//     offered to a backend, which then must not answer it (section 7.1.2.2).
//   - What the client is told is an answer to an element that it offered, and
//     follows from its offer and two facts about the first backend only:
//     whether it compresses, and whether it answered
//     server_no_context_takeover.
//   - What the client was told binds each later backend: it gets that as its
//     only offer and has to accept it.
//   - The client may have been told less than a backend keeps, never more. A
//     message from a smaller window or a fresh context inflates in a larger
//     one (sections 7.1.1.1 and 7.1.2.1), so a surplus is no concern of the
//     client and is not passed on.
//
// A backend that keeps its own context needs no rule: a fresh DEFLATE stream
// refers back to its own bytes only, and each message ends at a byte boundary
// (section 7.2.1).
//
// Rules of the header:
//
//   - Several elements, in one header line or in many, are alternatives in
//     order of preference (RFC 7692 section 5, RFC 6455 section 9.1).
//   - An element with an unknown or repeated parameter or a bad value is
//     declined in an offer and fails the handshake in an answer (RFC 7692
//     section 7.1).
//   - A quoted value means what the token in it means (RFC 6455 section 9.1).
//   - Window sizes are 8 to 15, decimal, without leading zeros (RFC 7692
//     sections 7.1.2.1 and 7.1.2.2).
//   - Only what was offered may be answered (RFC 6455 section 4.1).
//   - Names are compared without regard to case, as literals of the ABNF that
//     RFC 6455 builds on are (RFC 2616 section 2.1); we send lower case.
package deflate

import "fmt"

// Mode is the `compression` setting. The zero value is On.
type Mode uint8

const (
	// On compresses wherever client and backend do, except for clients known
	// to refuse what we have to answer.
	On Mode = iota

	// Safe compresses only where the client itself offered
	// client_no_context_takeover, so that no client is answered a parameter
	// that it did not name.
	Safe

	// Off removes every offer.
	Off
)

// ParseMode reads "on", "safe" or "off"; the empty string is On.
func ParseMode(s string) (Mode, error) {
	switch s {
	case "", "on":
		return On, nil
	case "safe":
		return Safe, nil
	case "off":
		return Off, nil
	default:
		return Off, fmt.Errorf("unknown compression mode %q: must be on, safe or off", s)
	}
}

// The names on the wire.
const (
	extensionName = "permessage-deflate"

	serverNoContext = "server_no_context_takeover"
	clientNoContext = "client_no_context_takeover"
	serverMaxWindow = "server_max_window_bits"
	clientMaxWindow = "client_max_window_bits"
)
