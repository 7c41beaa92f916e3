// This file tests the dials of a live connection to its next backends.

package opening

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

func TestSearchFindsABackend(t *testing.T) {
	b := accepting("Sec-WebSocket-Protocol: one")
	b.early = "early"
	l, p := newTestLine(t, told{subprotocol: "one"}, map[string]*backend{"b": b}, "b")
	found, err := l.Search(session.Interruption{Upstream: "a", Replayed: 7, Cause: 1012})(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if found.Upstream.Name() != "b" || found.Dial != "b.test:80" || string(found.Early) != "early" {
		t.Errorf("got %s, dialed as %s, early bytes %q", found.Upstream.Name(), found.Dial, found.Early)
	}
	r := b.requests[0]
	if got := r.Header.Get("Holdfast-Resume"); got != "attempt=1, replayed=7, cause=1012" {
		t.Errorf("Holdfast-Resume: got %q", got)
	}
	if r.Header.Get("Holdfast-Connection") != l.rec.ID() || r.RequestURI != "/chat?x=1" || r.Host != "example.com" ||
		r.Header.Get("Cookie") != "a=1" || r.Header.Get("Sec-WebSocket-Protocol") != "one, two" {
		t.Errorf("got %s of %s with %v, want the client's request", r.RequestURI, r.Host, r.Header)
	}
	if p.places("b") != 1 {
		t.Errorf("got %d places taken, want one", p.places("b"))
	}
	if _, err := found.Conn.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	found.Discard()
	if _, err := found.Conn.Write([]byte("x")); err == nil {
		t.Error("got a discarded connection still open")
	}
	if p.places("b") != 0 {
		t.Errorf("got %d places taken after Discard, want none", p.places("b"))
	}
}

// A resume goes round and round, by the newest config each time; a move tries each
// upstream once.
func TestSearchGoesRound(t *testing.T) {
	refused := errors.New("connection refused")
	backends := map[string]*backend{"a": {refuse: refused}, "b": {refuse: refused}, "c": accepting()}
	for _, move := range []bool{false, true} {
		t.Run(fmt.Sprintf("move %t", move), func(t *testing.T) {
			l, p := newTestLine(t, told{}, backends, "b", "a")
			try := l.Search(session.Interruption{Upstream: "a", Move: move, Cause: 1006})
			for range 2 {
				if _, err := try(t.Context()); !errors.Is(err, refused) {
					t.Fatalf("got %v, want that it is refused", err)
				}
			}
			p.names = []string{"c"} // a reload
			found, err := try(t.Context())
			want := []string{fmt.Sprintf("last=a move=%t", move)}
			if move {
				if !errors.Is(err, session.ErrNoUpstream) {
					t.Errorf("got %v, want that there is no other upstream", err)
				}
				if _, err := try(t.Context()); !errors.Is(err, session.ErrNoUpstream) {
					t.Errorf("got %v, want that it stays so", err)
				}
			} else {
				want = append(want, want[0])
				if err != nil || found.Upstream.Name() != "c" {
					t.Fatalf("got %v, want the upstream of the newest config", err)
				}
				found.Discard()
				if got := backends["c"].asked(); len(got) != 1 || !strings.HasPrefix(got[0], "attempt=3,") {
					t.Errorf("got the resume headers %q, want the third dial's", got)
				}
			}
			tried := []string{"b: false", "a: false", "c: true"}
			if !slices.Equal(p.tried, tried[:len(p.tried)]) || len(p.tried) < 2 {
				t.Errorf("got told that it tried %q, want %q", p.tried, tried)
			}
			if !slices.Equal(p.redials, want) {
				t.Errorf("got the pool asked %q, want %q", p.redials, want)
			}
			for name := range backends {
				if n := p.places(name); n != 0 {
					t.Errorf("got %d places taken at %s, want none", n, name)
				}
			}
		})
	}
	t.Run("no upstream at all", func(t *testing.T) {
		l, _ := newTestLine(t, told{}, backends)
		if _, err := l.Search(session.Interruption{Upstream: "a"})(t.Context()); !errors.Is(err, ErrNoUpstream) || errors.Is(err, session.ErrNoUpstream) {
			t.Errorf("got %v, want that there is none for now", err)
		}
	})
}

// A 4xx is final, but for those that are about the moment or the way.
func TestSearchRefused(t *testing.T) {
	for status := 200; status < 600; status++ {
		final := status >= 400 && status < 500 && status != 408 && status != 421 && status != 425 && status != 429
		if status%100 > 35 && status != 451 && status != 499 {
			continue
		}
		b := &backend{status: status}
		l, p := newTestLine(t, told{}, map[string]*backend{"b": b}, "b")
		_, err := l.Search(session.Interruption{Upstream: "a"})(t.Context())
		var refused *session.RefusedError
		if err == nil || errors.As(err, &refused) != final || final && refused.Status != status {
			t.Errorf("%d: got %v, want it final: %t", status, err, final)
		}
		if n := p.places("b"); n != 0 {
			t.Errorf("%d: got %d places taken, want none", status, n)
		}
	}
}

// A backend must agree with what the client was told.
func TestSearchAgrees(t *testing.T) {
	const deflated = "Sec-WebSocket-Extensions: permessage-deflate"
	offer := []string{"permessage-deflate; client_max_window_bits"}
	limited := []string{"permessage-deflate; server_max_window_bits=10"}
	fresh := []string{"permessage-deflate; server_no_context_takeover"}
	for _, test := range []struct {
		name  string
		told  told
		lines []string
		ok    bool
	}{
		{"nothing", told{}, nil, true},
		{"same subprotocol", told{subprotocol: "two"}, []string{"Sec-WebSocket-Protocol: two"}, true},
		{"other subprotocol", told{subprotocol: "two"}, []string{"Sec-WebSocket-Protocol: one"}, false},
		{"no subprotocol", told{subprotocol: "two"}, nil, false},
		{"surplus subprotocol", told{}, []string{"Sec-WebSocket-Protocol: one"}, false},
		{"compression", told{offer: offer, answer: []string{"permessage-deflate"}}, []string{deflated}, true},
		{"no compression any more", told{offer: offer, answer: []string{"permessage-deflate"}}, nil, false},
		{"surplus compression", told{offer: offer}, []string{deflated}, false},
		{"smaller window", told{offer: limited, answer: limited}, []string{deflated + "; server_max_window_bits=9"}, true},
		{"larger window", told{offer: limited, answer: limited}, []string{deflated + "; server_max_window_bits=11"}, false},
		{"no limit of the window", told{offer: limited, answer: limited}, []string{deflated}, false},
		{"no context takeover", told{offer: fresh, answer: fresh}, []string{deflated + "; server_no_context_takeover"}, true},
		{"context takeover", told{offer: fresh, answer: fresh}, []string{deflated}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, p := newTestLine(t, test.told, map[string]*backend{"b": accepting(test.lines...)}, "b")
			found, err := l.Search(session.Interruption{Upstream: "a"})(t.Context())
			var refused *session.RefusedError
			if (err == nil) != test.ok || errors.As(err, &refused) {
				t.Errorf("got %v, want it taken: %t, and no final refusal", err, test.ok)
			}
			if found != nil {
				found.Discard()
			}
			if n := p.places("b"); n != 0 {
				t.Errorf("got %d places taken, want none", n)
			}
			if !eventually(func() bool { b := p.backends["b"]; b.mu.Lock(); defer b.mu.Unlock(); return b.open == 0 }) {
				t.Error("got a connection left open")
			}
		})
	}
}

// Errors of a dial: refused, silent, garbage. The place is given back, and the turn.
func TestSearchFails(t *testing.T) {
	silent := accepting()
	silent.wait = make(chan struct{})
	defer close(silent.wait)
	for _, test := range []struct {
		name string
		b    *backend
		want string
	}{
		{"refused", &backend{refuse: errors.New("connection refused")}, "dialing b.test:80: connection refused"},
		{"silent", silent, "handshake with b.test:80"},
		{"an extension that was not offered", accepting("Sec-WebSocket-Extensions: x-unknown"), "handshake with b.test:80"},
		{"a subprotocol that was not offered", accepting("Sec-WebSocket-Protocol: three"), "handshake with b.test:80"},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, p := newTestLine(t, told{}, map[string]*backend{"b": test.b}, "b")
			p.concurrency = 1
			for range 2 { // the second one would wait for ever if the turn were lost
				began := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				_, err := l.Search(session.Interruption{Upstream: "a"})(ctx)
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want %q", err, test.want)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("got an answer after %v, want it within the timeouts", took)
				}
				if n := p.places("b"); n != 0 {
					t.Errorf("got %d places taken, want none", n)
				}
			}
		})
	}
}

// The end of a session ends its dial, and its waiting for a turn.
func TestSearchGivesUpWithItsContext(t *testing.T) {
	b := accepting()
	b.wait = make(chan struct{})
	defer close(b.wait)
	l, p := newTestLine(t, told{}, map[string]*backend{"b": b}, "b")
	p.concurrency = 1
	search := func(ctx context.Context) <-chan error {
		try, done := l.Search(session.Interruption{Upstream: "a"}), make(chan error, 1)
		go func() { // ends with ctx
			_, err := try(ctx)
			done <- err
		}()
		return done
	}
	first, endFirst := context.WithCancel(t.Context())
	second, endSecond := context.WithCancel(t.Context())
	defer endFirst()
	defer endSecond()
	dialing := search(first)
	if !eventually(func() bool { return len(b.asked()) == 1 }) {
		t.Fatal("the first one does not dial")
	}
	waiting := search(second)
	if !eventually(func() bool { return p.places("b") == 2 }) {
		t.Fatal("the second one takes no place")
	}
	endSecond()
	if err := <-waiting; !errors.Is(err, context.Canceled) {
		t.Errorf("waiting: got %v, want that it gave up", err)
	}
	if n := p.places("b"); n != 1 {
		t.Errorf("got %d places taken, want that of the first one", n)
	}
	began := time.Now()
	endFirst()
	if err, took := <-dialing, time.Since(began); err == nil || took > time.Second {
		t.Errorf("dialing: got error %v after %v, want that it gives up at once", err, took)
	}
	if n := p.places("b"); n != 0 {
		t.Errorf("got %d places taken, want none", n)
	}
}

// No more connections dial an upstream at once than the route allows.
func TestSearchTakesItsTurn(t *testing.T) {
	const limit, searches = 3, 12
	b := accepting()
	b.wait = make(chan struct{})
	l, p := newTestLine(t, told{}, map[string]*backend{"b": b}, "b")
	p.concurrency = limit
	var all sync.WaitGroup
	for range searches {
		try := l.Search(session.Interruption{Upstream: "a"})
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			found, err := try(ctx)
			if err != nil {
				t.Error(err)
				return
			}
			found.Discard()
		})
	}
	if !eventually(func() bool { return len(b.asked()) == limit && p.places("b") == searches }) {
		t.Errorf("got %d handshakes, %d places, want %d and %d", len(b.asked()), p.places("b"), limit, searches)
	}
	close(b.wait)
	all.Wait()
	if b.mu.Lock(); b.most != limit {
		t.Errorf("got %d dials at once, want %d", b.most, limit)
	}
	b.mu.Unlock()
	if n := p.places("b"); n != 0 || len(b.asked()) != searches {
		t.Errorf("got %d places taken, %d handshakes, want none, %d", n, len(b.asked()), searches)
	}
}
