// This file holds both halves of a handshake: the offer to a backend and the
// check of its answer.

package deflate

import (
	"errors"
	"fmt"
	"strings"
)

// Netty's stock client handler is known by the two older extensions that it
// offers beside permessage-deflate.
const (
	deflateFrame       = "deflate-frame"
	webkitDeflateFrame = "x-webkit-deflate-frame"
)

// Negotiation is what backends are offered on behalf of one client: the zero
// value nothing. It is a small value without pointers, and comparable.
type Negotiation struct {
	// The alternatives in the client's order without repetition; the first
	// zero ends them.
	offered [maxTerms]terms

	// The client was told that there is compression: a backend that declines
	// cannot serve it.
	promised bool
}

// Negotiate reads the values of the client's Sec-WebSocket-Extensions headers.
//
// An element that RFC 7692 section 7.1 has a server decline is left out, others
// stand. A value that does not follow the grammar anywhere makes the whole
// header count as no offer, and so the connection is not compressed: where its
// elements begin is then a guess. (RFC 6455 section 9.1 would have the
// handshake fail; a client that works today should not stop working here.)
//
// Netty's default client fails the handshake if it is answered
// client_no_context_takeover without having offered it. An offer that looks
// like Netty's is therefore treated as in Safe. One that was built by hand with
// permessage-deflate alone cannot be told from a browser's and needs Safe.
func Negotiate(clientOffers []string, mode Mode) Negotiation {
	if mode != On && mode != Safe {
		return Negotiation{}
	}
	var all, safe Negotiation
	err := eachElement(clientOffers, func(e *element) error {
		switch {
		case e.is(deflateFrame), e.is(webkitDeflateFrame):
			mode = Safe
		case e.is(extensionName) && e.err == nil:
			all.add(e.terms)
			if e.has(hasClientNoContext) {
				safe.add(e.terms)
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return Negotiation{}
	case mode == Safe:
		return safe
	default:
		return all
	}
}

// Offer is the Sec-WebSocket-Extensions value for the backend. If it is empty
// the header must not be sent.
//
// All alternatives are kept, since a backend may support only a later one, and
// in the client's order, since the backend takes the first that it supports.
// Alternatives that differ only in what is not passed on become one.
func (n Negotiation) Offer() string {
	var b strings.Builder
	for i, t := range n.offered {
		if t == 0 {
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(t.String())
	}
	return b.String()
}

// Accept checks the values of a backend's Sec-WebSocket-Extensions headers
// against the offer, and returns what that means for the client. An error says
// that the handshake with this backend failed.
//
// On a negotiation from Redial the result always agrees with what the client
// was told: a backend that declines, which elsewhere is no error, is one there.
func (n Negotiation) Accept(backendAnswer []string) (Agreement, error) {
	answer, err := parseAnswer(backendAnswer)
	if err != nil {
		return Agreement{}, err
	}
	if answer == 0 {
		if n.promised {
			return Agreement{}, errDeclined
		}
		return Agreement{}, nil
	}
	if n.offered[0] == 0 {
		return Agreement{}, fmt.Errorf("%s was answered but not offered", extensionName)
	}

	told := n.loosest(answer.fresh())
	switch {
	case told == 0:
		return Agreement{}, fmt.Errorf("%s: %s was offered but not answered", extensionName, serverNoContext)
	case answer.window() <= told.window():
		return Agreement{told: told}, nil
	case answer.window() == anyWindow:
		return Agreement{}, fmt.Errorf("%s: %s=%d was offered but not answered",
			extensionName, serverMaxWindow, told.window())
	default:
		return Agreement{}, fmt.Errorf("%s: %s=%d was answered, at most %d was offered",
			extensionName, serverMaxWindow, answer.window(), told.window())
	}
}

// add appends an alternative unless it is there already; that there are no more
// different ones than places is what maxTerms says.
func (n *Negotiation) add(t terms) {
	for i, have := range n.offered {
		if have == t {
			return
		}
		if have == 0 {
			n.offered[i] = t
			return
		}
	}
}

// loosest is what the client is told if the backend answered, or did not
// answer, server_no_context_takeover: among the alternatives that such an
// answer may refer to, the one with the largest window. An answer satisfies any
// of them if and only if it satisfies this one, so nothing is lost by it, and
// nothing has to be guessed about which was meant. Zero means that all of them
// ask for server_no_context_takeover, which the answer lacks (RFC 7692 section
// 7.1.1.1). A server may answer it unasked, so with it all alternatives remain.
func (n Negotiation) loosest(fresh bool) terms {
	var window uint8
	for _, t := range n.offered {
		if fresh || !t.fresh() {
			window = max(window, t.window())
		}
	}
	if window == 0 {
		return 0
	}
	return newTerms(window, fresh)
}

// parseAnswer reads the one element that an answer may have; zero is none.
func parseAnswer(values []string) (terms, error) {
	var answer terms
	err := eachElement(values, func(e *element) error {
		switch {
		case !e.is(extensionName):
			return fmt.Errorf("extension %.100s was answered but not offered", e.name)
		case answer != 0:
			return fmt.Errorf("%s was answered twice", extensionName)
		case e.has(hasClientMaxWindow):
			return fmt.Errorf("%s: %s was answered but not offered", extensionName, clientMaxWindow)
		case e.err != nil:
			return e.err
		}
		answer = e.terms
		return nil
	})
	if err != nil {
		return 0, err
	}
	return answer, nil
}

var errDeclined = errors.New(extensionName + " was declined, but the client was told that there is compression")
