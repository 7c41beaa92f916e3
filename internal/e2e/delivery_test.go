// This file holds the checker of what clients sent against what backends recorded, and
// the test that it finds faults.

package e2e

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// numbered returns message n of a client: one that tells when a part of it is missing.
// Most are short, some are not.
func numbered(client, n int) string {
	size := 10 + n%40
	if n%16 == 15 {
		size = 3000
	}
	return fmt.Sprintf("%d:%d:%s", client, n, strings.Repeat("x", size))
}

// promise is what a value of replay promises in one way of losing backends.
type promise struct {
	repeats bool // messages may come again, as the first of a resumed connection
	gaps    bool // what a lost backend was sent may be missing
	held    bool // with gaps: but not what was sent while there was no backend
	doubt   bool // clients may be closed with 1012
}

// Promises of the values of replay, when backends are killed, and when they close and
// read until they are answered.
var (
	killPromises = map[string]promise{
		"unacked": {repeats: true},
		"unsent":  {gaps: true, held: true},
		"strict":  {doubt: true},
		"off":     {gaps: true},
	}
	closePromises = map[string]promise{
		"unacked": {},
		"unsent":  {},
		"strict":  {},
		"off":     {gaps: true},
	}
)

// delivery is what a client sent and what became of it.
type delivery struct {
	client int
	sent   int      // messages 0 to sent-1; so many writes went well
	ended  ending   // of the connection, zero if it lived until the client closed it
	held   [][2]int // of the messages sent: from, to (excluded) while it had no backend
	conns  []*backendConn
}

// faults says what is wrong with a delivery. Causes are those that Holdfast-Resume may
// tell.
func (d *delivery) faults(p promise, causes ...int) (faults []string) {
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Sprintf("client %d: ", d.client)+fmt.Sprintf(format, args...))
	}
	inDoubt := p.doubt && d.ended.Clean && d.ended.Code == 1012
	if d.ended != (ending{}) && !inDoubt {
		fault("was dropped: %d %q", d.ended.Code, d.ended.Reason)
	}
	var lost [][2]int
	next := 0 // the message after the latest that has come
	for i, c := range d.conns {
		replayed, problem := c.replayed(i, causes)
		if problem != "" {
			fault("connection %d %v: %s", i, c, problem)
		}
		last := -1 // of this connection
		for j, text := range c.texts {
			n, ok := numberOf(d.client, text)
			switch {
			case !ok:
				fault("connection %d %v: message %d is torn, or not of this client: %.60q", i, c, j, text)
				continue
			case j > 0 && n != last+1:
				fault("connection %d %v: message %d follows on %d", i, c, n, last)
			case n > next && !p.gaps:
				fault("connection %d %v: messages %d to %d are lost", i, c, next, n-1)
			case n > next && i == 0:
				fault("connection %d %v: it begins with %d, nothing was lost before", i, c, n)
			case n < next && !p.repeats:
				fault("connection %d %v: message %d comes again", i, c, n)
			case n < next && j >= replayed:
				fault("connection %d %v: message %d comes again, as number %d of the connection", i, c, n, j)
			}
			if n > next {
				lost = append(lost, [2]int{next, n})
			}
			last, next = n, max(next, n+1)
		}
	}
	// The write that failed may have arrived all the same.
	if next > d.sent && (d.ended == (ending{}) || next > d.sent+1) {
		fault("messages up to %d came, only %d were sent", next-1, d.sent)
	}
	if next < d.sent && !inDoubt {
		fault("messages %d to %d, the last, are lost", next, d.sent-1)
	}
	for _, h := range d.held {
		for _, l := range lost {
			if from, to := max(h[0], l[0]), min(h[1], l[1]); p.held && from < to {
				fault("messages %d to %d, sent while there was no backend, are lost", from, to-1)
			}
		}
	}
	if len(faults) > 10 { // one fault brings others along
		faults = append(faults[:10], "…")
	}
	return faults
}

// replayed returns how many of the first messages of the i-th connection of a client
// may be repeats, and what is wrong with how it says so.
func (c *backendConn) replayed(i int, causes []int) (replayed int, problem string) {
	if i == 0 {
		if c.resume != "" {
			return 0, "it resumes nothing"
		}
		return 0, ""
	}
	var attempt, cause int
	if _, err := fmt.Sscanf(c.resume, "attempt=%d, replayed=%d, cause=%d", &attempt, &replayed, &cause); err != nil ||
		c.resume != fmt.Sprintf("attempt=%d, replayed=%d, cause=%d", attempt, replayed, cause) {
		return 0, "Holdfast-Resume is not well-formed"
	}
	if attempt < 1 || replayed < 0 {
		return 0, "Holdfast-Resume has impossible numbers"
	}
	if !slices.Contains(causes, cause) {
		return replayed, fmt.Sprintf("got cause %d, want one of %d", cause, causes)
	}
	return replayed, ""
}

// numberOf returns the number of a client's message, if that is what it is.
func numberOf(client int, text string) (n int, ok bool) {
	fields := strings.SplitN(text, ":", 3)
	if len(fields) != 3 {
		return 0, false
	}
	n, err := strconv.Atoi(fields[1])
	return n, err == nil && n >= 0 && text == numbered(client, n)
}

// senderOf returns the client of the first message in conns, -1 if there is none.
func senderOf(conns []*backendConn) int {
	for _, c := range conns {
		if len(c.texts) > 0 {
			client, err := strconv.Atoi(strings.SplitN(c.texts[0], ":", 2)[0])
			if err == nil {
				return client
			}
		}
	}
	return -1
}

// summary counts what deliveries had to bear.
type summary struct {
	messages, resumed, repeated, lost int
}

func (s *summary) add(d *delivery) {
	s.messages += d.sent
	s.resumed += max(0, len(d.conns)-1)
	came := make(map[string]bool)
	for _, c := range d.conns {
		for _, text := range c.texts {
			if came[text] {
				s.repeated++
			}
			came[text] = true
		}
	}
	s.lost += max(0, d.sent-len(came))
}

func (s *summary) String() string {
	return fmt.Sprintf("%d messages, %d connections resumed, %d messages repeated, %d lost", s.messages, s.resumed, s.repeated, s.lost)
}

// A checker that finds nothing proves nothing.
func TestCheckerFindsFaults(t *testing.T) {
	// span is messages from to to, excluded, of client 7.
	span := func(from, to int) (texts []string) {
		for n := from; n < to; n++ {
			texts = append(texts, numbered(7, n))
		}
		return texts
	}
	const resumed = "attempt=1, replayed=%d, cause=1006"
	conn := func(replayed int, texts ...[]string) *backendConn {
		c := &backendConn{backend: "a", texts: slices.Concat(texts...)}
		if replayed >= 0 {
			c.resume = fmt.Sprintf(resumed, replayed)
		}
		return c
	}
	first := conn(-1, span(0, 10))
	doubt := ending{Code: 1012, Reason: "in doubt", Clean: true}
	kept := ending{}
	torn := conn(-1, []string{numbered(7, 15)[:100]})

	for _, test := range []struct {
		name    string
		promise promise
		sent    int
		ended   ending
		held    [][2]int
		conns   []*backendConn
		fault   string // what the only fault says; empty: none
	}{
		{"undisturbed", promise{}, 10, kept, nil, []*backendConn{first}, ""},
		{"resumed", promise{}, 20, kept, nil, []*backendConn{first, conn(0, span(10, 20))}, ""},
		{"resumed without a message", promise{}, 10, kept, nil, []*backendConn{first, conn(0), conn(0)}, ""},
		{"nothing came", promise{}, 10, kept, nil, nil, "messages 0 to 9, the last, are lost"},
		{"last lost", promise{gaps: true}, 11, kept, nil, []*backendConn{first}, "messages 10 to 10, the last, are lost"},
		{"last comes again", promise{}, 9, kept, nil, []*backendConn{first}, "only 9 were sent"},
		{"dropped", killPromises["unacked"], 10, ending{Code: 1006, Reason: "EOF"}, nil, []*backendConn{first}, "was dropped: 1006"},
		{"dropped with 1012", killPromises["unacked"], 10, doubt, nil, []*backendConn{first}, "was dropped: 1012"},
		{"of another client", promise{}, 0, kept, nil, []*backendConn{conn(-1, []string{numbered(8, 0)})}, "not of this client"},
		{"torn", promise{}, 0, kept, nil, []*backendConn{torn}, "is torn"},
		{"out of order", promise{}, 2, kept, nil, []*backendConn{conn(-1, span(1, 2), span(0, 1))}, "*"},

		{"not resumed", killPromises["unacked"], 10, kept, nil, []*backendConn{first, conn(-1)}, "not well-formed"},
		{"resumes nothing", killPromises["unacked"], 10, kept, nil, []*backendConn{conn(0, span(0, 10))}, "resumes nothing"},
		{"wrong cause", killPromises["unacked"], 10, kept, nil, []*backendConn{first, {resume: "attempt=1, replayed=0, cause=1000"}}, "want one of [1006]"},
		{"surplus", killPromises["unacked"], 10, kept, nil, []*backendConn{first, {resume: "attempt=1, replayed=0, cause=1006, x"}}, "not well-formed"},
		{"no attempt", killPromises["unacked"], 10, kept, nil, []*backendConn{first, {resume: "attempt=0, replayed=0, cause=1006"}}, "impossible numbers"},

		{"repeats", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(3, span(7, 20))}, ""},
		{"fewer repeats than said", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(8, span(7, 20))}, ""},
		{"repeats cut short", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(8, span(2, 5)), conn(8, span(2, 20))}, ""},
		{"more repeats than said", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(2, span(7, 20))}, "message 9 comes again, as number 2"},
		{"repeats later", killPromises["unacked"], 12, kept, nil, []*backendConn{first, conn(1, span(9, 12), span(11, 12))}, "follows on"},
		{"repeats on the first", killPromises["unacked"], 10, kept, nil, []*backendConn{conn(-1, span(0, 10), span(9, 10))}, "follows on"},
		{"lost between", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(0, span(11, 20))}, "messages 10 to 10 are lost"},
		{"lost after repeats", killPromises["unacked"], 20, kept, nil, []*backendConn{first, conn(3, span(7, 10), span(11, 20))}, "*"},
		{"a message twice, at once", killPromises["unacked"], 12, kept, nil, []*backendConn{first, conn(2, span(9, 10), span(9, 12))}, "follows on"},

		{"gap", killPromises["unsent"], 20, kept, nil, []*backendConn{first, conn(0, span(12, 20))}, ""},
		{"gap before what was held", killPromises["unsent"], 20, kept, [][2]int{{12, 16}}, []*backendConn{first, conn(0, span(12, 20))}, ""},
		{"gap in what was held", killPromises["unsent"], 20, kept, [][2]int{{11, 16}}, []*backendConn{first, conn(0, span(12, 20))}, "messages 11 to 11, sent while there was no backend"},
		{"gap in what was held, no promise", killPromises["off"], 20, kept, [][2]int{{11, 16}}, []*backendConn{first, conn(0, span(12, 20))}, ""},
		{"gap at the beginning", killPromises["unsent"], 10, kept, nil, []*backendConn{conn(-1, span(1, 10))}, "nothing was lost before"},
		{"gap within", killPromises["unsent"], 10, kept, nil, []*backendConn{conn(-1, span(0, 5), span(6, 10))}, "follows on"},
		{"gap within the second", killPromises["off"], 20, kept, nil, []*backendConn{first, conn(0, span(10, 15), span(16, 20))}, "follows on"},
		{"twice, unsent", killPromises["unsent"], 20, kept, nil, []*backendConn{first, conn(1, span(9, 20))}, "message 9 comes again"},
		{"twice, off", killPromises["off"], 20, kept, nil, []*backendConn{first, conn(1, span(9, 20))}, "message 9 comes again"},

		{"in doubt", killPromises["strict"], 20, doubt, nil, []*backendConn{first}, ""},
		{"in doubt, with the write that failed", killPromises["strict"], 9, doubt, nil, []*backendConn{first}, ""},
		{"in doubt, more than was sent", killPromises["strict"], 8, doubt, nil, []*backendConn{first}, "only 8 were sent"},
		{"in doubt later", killPromises["strict"], 30, doubt, nil, []*backendConn{first, conn(0, span(10, 20))}, ""},
		{"in doubt, a gap", killPromises["strict"], 30, doubt, nil, []*backendConn{first, conn(0, span(11, 20))}, "messages 10 to 10 are lost"},
		{"in doubt, twice", killPromises["strict"], 30, doubt, nil, []*backendConn{first, conn(1, span(9, 20))}, "message 9 comes again"},
		{"not in doubt, lost", killPromises["strict"], 20, kept, nil, []*backendConn{first}, "messages 10 to 19, the last, are lost"},
		{"not in doubt, a gap", killPromises["strict"], 20, kept, nil, []*backendConn{first, conn(0, span(11, 20))}, "messages 10 to 10 are lost"},
		{"1012 without a closing handshake", killPromises["strict"], 10, ending{Code: 1012}, nil, []*backendConn{first}, "was dropped"},
		{"dropped with another code", killPromises["strict"], 10, ending{Code: 1013, Clean: true}, nil, []*backendConn{first}, "was dropped: 1013"},

		{"closed in good order", closePromises["unacked"], 20, kept, nil, []*backendConn{first, conn(0, span(10, 20))}, ""},
		{"closed, repeats", closePromises["unacked"], 20, kept, nil, []*backendConn{first, conn(1, span(9, 20))}, "message 9 comes again"},
		{"closed, lost", closePromises["unsent"], 20, kept, nil, []*backendConn{first, conn(0, span(11, 20))}, "messages 10 to 10 are lost"},
		{"closed, in doubt", closePromises["strict"], 10, doubt, nil, []*backendConn{first}, "was dropped: 1012"},
		{"closed, off", closePromises["off"], 20, kept, nil, []*backendConn{first, conn(0, span(11, 20))}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := delivery{client: 7, sent: test.sent, ended: test.ended, held: test.held, conns: test.conns}
			got := d.faults(test.promise, 1006)
			switch {
			case test.fault == "" && len(got) > 0:
				t.Errorf("faults: got %q, want none", got)
			case test.fault == "*" && len(got) == 0:
				t.Error("faults: got none, want some")
			case test.fault != "" && test.fault != "*" && (len(got) != 1 || !strings.Contains(got[0], test.fault)):
				t.Errorf("faults: got %q, want one that says %q", got, test.fault)
			}
		})
	}
}
