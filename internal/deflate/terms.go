// This file holds terms, the part of an element that outlives the handshake.

package deflate

import "strconv"

const (
	minWindow = 8
	maxWindow = 15

	// An absent server_max_window_bits. It allows the window that 15 does,
	// but an offer of 15 has to be answered and an absent one does not (RFC
	// 7692 section 7.1.2.1), which is the order of the numbers 15 and 16.
	anyWindow = maxWindow + 1

	// How many different terms there are: each window with and without
	// server_no_context_takeover.
	maxTerms = 2 * (anyWindow - minWindow + 1)
)

// terms is what the server side of a connection is held to, in one byte: the
// window (8 to 16) in the low bits, server_no_context_takeover in the high one.
// The client side needs none, it is the same for everybody. Zero is no
// compression.
type terms uint8

const freshContext terms = 0x80

func newTerms(window uint8, fresh bool) terms {
	t := terms(window)
	if fresh {
		t |= freshContext
	}
	return t
}

func (t terms) window() uint8 { return uint8(t &^ freshContext) }

func (t terms) fresh() bool { return t&freshContext != 0 }

// String is the element as it is sent, the same in an offer to a backend and in
// an answer to a client.
func (t terms) String() string {
	if t == 0 {
		return ""
	}
	s := extensionName + "; " + clientNoContext
	if t.fresh() {
		s += "; " + serverNoContext
	}
	if t.window() != anyWindow {
		s += "; " + serverMaxWindow + "=" + strconv.Itoa(int(t.window()))
	}
	return s
}
