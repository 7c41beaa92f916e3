// This file holds the parser of Sec-WebSocket-Extensions (RFC 6455 section 9.1).

package deflate

import (
	"fmt"
	"strconv"
	"strings"
)

// element is one entry of the header. Everything but the name is read of
// permessage-deflate only.
type element struct {
	name  string // as sent
	terms terms

	// Which parameters are there; client_max_window_bits and
	// client_no_context_takeover have no place in terms.
	params params

	// The first parameter that makes the element one to decline.
	err error
}

type params uint8

const (
	hasServerNoContext params = 1 << iota
	hasClientNoContext
	hasServerMaxWindow
	hasClientMaxWindow
)

func (e *element) is(name string) bool { return strings.EqualFold(e.name, name) }

func (e *element) has(p params) bool { return e.params&p != 0 }

// eachElement calls visit for each element of the header's values in order. It
// ends at the first error of visit and at the first value that does not follow
// the grammar. A bad parameter of a well-formed element is in the element: it
// spoils that one only. Empty list elements are passed over (RFC 9110 section
// 5.6.1.2). Elements are visited rather than returned to keep what a long
// header costs in proportion.
func eachElement(values []string, visit func(*element) error) error {
	for _, value := range values {
		s := scanner{rest: value}
		for {
			s.skipSpace()
			if s.done() {
				break
			}
			if s.take(',') {
				continue
			}
			var e element
			if !s.element(&e) {
				return fmt.Errorf("malformed extension list %.100q", value)
			}
			if err := visit(&e); err != nil {
				return err
			}
		}
	}
	return nil
}

// param adds a parameter to the element.
func (e *element) param(name, value string, hasValue bool) {
	if e.err != nil || !e.is(extensionName) {
		return
	}
	fail := func(problem string) {
		e.err = fmt.Errorf("%s: %.100s %s", extensionName, name, problem)
	}

	var p params
	switch name = strings.ToLower(name); name {
	case serverNoContext:
		p = hasServerNoContext
	case clientNoContext:
		p = hasClientNoContext
	case serverMaxWindow:
		p = hasServerMaxWindow
	case clientMaxWindow:
		p = hasClientMaxWindow
	default:
		fail("is not a known parameter")
		return
	}
	if e.has(p) {
		fail("is there twice")
		return
	}
	e.params |= p

	switch p {
	case hasServerNoContext, hasClientNoContext:
		if hasValue {
			fail("takes no value")
			return
		}
		if p == hasServerNoContext {
			e.terms |= freshContext
		}

	case hasServerMaxWindow, hasClientMaxWindow:
		// Only client_max_window_bits may go without a value, and only in an
		// offer (RFC 7692 section 7.1.2.2); an answer may not have it at all
		// here, so the difference does not matter.
		if !hasValue && p == hasClientMaxWindow {
			return
		}
		window, ok := parseWindow(value)
		if !ok {
			fail(fmt.Sprintf("is %.100q, must be from %d to %d", value, minWindow, maxWindow))
			return
		}
		if p == hasServerMaxWindow {
			e.terms = newTerms(window, e.terms.fresh())
		}
	}
}

// parseWindow reads the value of either window parameter. The length check
// keeps out what Atoi would take: leading zeros and signs.
func parseWindow(value string) (window uint8, ok bool) {
	n, err := strconv.Atoi(value)
	if err != nil || n < minWindow || n > maxWindow || len(value) != len(strconv.Itoa(n)) {
		return 0, false
	}
	return uint8(n), true
}

// scanner reads one header value from the front.
type scanner struct {
	rest string
}

// element reads a name and its parameters up to a comma or the end. Space
// around each separator is allowed, the equals sign included: RFC 6455 takes
// its grammar from RFC 2616, where space between tokens is implied.
func (s *scanner) element(e *element) bool {
	e.terms = newTerms(anyWindow, false)
	if e.name = s.token(); e.name == "" {
		return false
	}
	for {
		s.skipSpace()
		if s.done() || s.take(',') {
			return true
		}
		if !s.take(';') {
			return false
		}
		s.skipSpace()
		name := s.token()
		if name == "" {
			return false
		}
		s.skipSpace()
		if !s.take('=') {
			e.param(name, "", false)
			continue
		}
		s.skipSpace()
		value := s.value()
		if value == "" {
			return false
		}
		e.param(name, value, true)
	}
}

// value reads a token, bare or quoted; "" is none.
func (s *scanner) value() string {
	if !s.take('"') {
		return s.token()
	}
	var unquoted strings.Builder
	for !s.done() {
		c := s.rest[0]
		s.rest = s.rest[1:]
		switch {
		case c == '"':
			return unquoted.String()
		case c == '\\' && !s.done():
			c = s.rest[0]
			s.rest = s.rest[1:]
		}
		if !isTokenByte(c) {
			return "" // what is quoted must be a token too
		}
		unquoted.WriteByte(c)
	}
	return ""
}

// token reads a token; "" is none.
func (s *scanner) token() string {
	i := 0
	for i < len(s.rest) && isTokenByte(s.rest[i]) {
		i++
	}
	token := s.rest[:i]
	s.rest = s.rest[i:]
	return token
}

func (s *scanner) take(c byte) bool {
	if s.done() || s.rest[0] != c {
		return false
	}
	s.rest = s.rest[1:]
	return true
}

func (s *scanner) skipSpace() { s.rest = strings.TrimLeft(s.rest, " \t") }

func (s *scanner) done() bool { return s.rest == "" }

// isTokenByte tells what a token is made of (RFC 9110 section 5.6.2).
func isTokenByte(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		return true
	default:
		return strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
	}
}
