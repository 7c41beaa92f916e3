// This file holds the subtests of testGuest.

package e2e

import (
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Messages of every length encoding arrive whole and unchanged, both ways.
func (s *stay) testMessages(t *testing.T) {
	var messages []content
	var total uint64
	for _, kind := range []string{"text", "binary"} {
		for _, size := range []int{0, 1, 125, 126, 65535, 65536, 16 << 20} {
			messages = append(messages, content{Kind: kind, Size: size})
			total += uint64(size)
		}
	}
	v, err := s.begin(t, "/echo", nil, target{})
	if err != nil {
		t.Fatal(err)
	}
	if v.opened != (opened{}) {
		t.Errorf("handshake: got %+v, want no subprotocol and no extension", v.opened)
	}
	v.echoes(messages)
	c := v.waitCounts(uint64(len(messages)))
	if c.BytesIn != total || c.BytesOut != total {
		t.Errorf("bytes: got %d in, %d out, want %d each", c.BytesIn, c.BytesOut, total)
	}
	if c.State != "open" || c.Protocol != "h1" || c.Subprotocol != "" {
		t.Errorf("connection: got %+v, want an open one over h1", c)
	}
	if s.lastPings > 0 {
		// The proxy itself answers a client that was slow to take what came a moment
		// ago, as one may be with 16 MiB.
		pass(1200 * time.Millisecond)
	}
	r := v.leave(ending{Code: 1000})
	if offers := r.Offer != ""; offers != s.offers {
		t.Errorf("extensions offered to the backend: got %q, want any: %v", r.Offer, s.offers)
	}
	if len(r.clientPings()) != s.lastPings {
		t.Errorf("pings that reached the backend: got %q, want %d", r.Pings, s.lastPings)
	}
}

// Of the client's subprotocols the backend picks one, or none, and all agree.
func (s *stay) testSubprotocol(t *testing.T) {
	for _, test := range []struct {
		name  string
		offer []string
		pick  string
	}{
		{"second of two", []string{"chat.v1", "chat.v2"}, "chat.v2"},
		{"none offered", []string{}, ""},
		{"none picked", []string{"chat.v1", "chat.v2"}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			query := url.Values{}
			if test.pick != "" {
				query.Set("protocol", test.pick)
			}
			v, err := s.begin(t, "/echo", query, target{Protocols: test.offer})
			var r report
			if test.pick == "" && len(test.offer) > 0 && s.needsReply {
				if err == nil {
					t.Errorf("open: got %+v, want the client to refuse", v.opened)
				}
				r = v.report()
				v.ended("client_gone")
			} else {
				if err != nil {
					t.Fatal(err)
				}
				if v.opened.Protocol != test.pick {
					t.Errorf("subprotocol, as the client sees it: got %q, want %q", v.opened.Protocol, test.pick)
				}
				// The client may have its 101 a moment before the connection counts as open.
				var c connection
				if !eventually(15*time.Second, func() bool { c = v.connection(); return c.State == "open" }) {
					t.Fatalf("connection: got %+v, want an open one", c)
				}
				if c.Subprotocol != test.pick {
					t.Errorf("subprotocol in the API: got %q, want %q", c.Subprotocol, test.pick)
				}
				r = v.leave(ending{Code: 1000})
			}
			if !reflect.DeepEqual(r.Offered, test.offer) || r.Protocol != test.pick {
				t.Errorf("subprotocol, as the backend sees it: got %q of %q, want %q of %q", r.Protocol, r.Offered, test.pick, test.offer)
			}
		})
	}
}

// permessage-deflate is agreed end to end, on terms by which another backend
// could take over, and what passes is compressed.
func (s *stay) testCompression(t *testing.T) {
	v, err := s.begin(t, "/echo", nil, target{Compress: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"permessage-deflate", "client_no_context_takeover"} {
		if n := strings.Count(v.opened.Extensions, want); n != 1 {
			t.Errorf("extensions, as the client sees them: got %q, want %s once", v.opened.Extensions, want)
		}
	}
	// Twice the same: a server may use what it sent before, the client may not.
	v.echoes([]content{{"text", 65536, true}, {"text", 65536, true}, {"binary", 65536, true}})
	c := v.waitCounts(3)
	const few = 8 << 10
	if c.BytesIn == 0 || c.BytesIn > few || c.BytesOut == 0 || c.BytesOut > few {
		t.Errorf("bytes of 192 KiB that compress well: got %d in, %d out, want some, but at most %d", c.BytesIn, c.BytesOut, few)
	}
	messages := []content{{"text", s.biggest, false}, {"text", 65536, true}}
	for _, kind := range []string{"binary", "text"} {
		for _, size := range []int{0, 1, 125, 126, 65535, 65536} {
			messages = append(messages, content{kind, size, false})
		}
	}
	v.echoes(messages)
	v.waitCounts(3 + uint64(len(messages)))
	r := v.leave(ending{Code: 1000})
	if !strings.Contains(r.Offer, "client_no_context_takeover") || strings.Contains(r.Offer, "client_max_window_bits") {
		t.Errorf("offer to the backend: got %q, want client_no_context_takeover and no client_max_window_bits", r.Offer)
	}
}

// Fragmented messages pass either way, and pings between the fragments are
// answered by the peer before the message goes on.
func (s *stay) testFragments(t *testing.T) {
	for _, test := range []struct {
		name     string
		message  content
		cuts     []int
		compress bool
	}{
		// The text's first multi-byte character is cut, too.
		{"text", content{"text", 65536, false}, []int{0, 1, 5, 125, 65535}, false},
		{"binary", content{"binary", 200000, false}, []int{125, 251, 65787, 131323, 200000}, false},
		{"compressed text", content{"text", 100000, true}, []int{30000, 30001, 60000}, true},
		{"compressed binary", content{"binary", 100000, false}, []int{30000, 30001, 60000}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			var cuts []string
			for _, cut := range test.cuts {
				cuts = append(cuts, strconv.Itoa(cut))
			}
			v, err := s.begin(t, "/fragments", url.Values{"cuts": {strings.Join(cuts, ",")}}, target{Compress: test.compress})
			if err != nil {
				t.Fatal(err)
			}
			want := test.message.message()
			var got message
			pings := len(cuts) + s.lastPings
			if f, ok := s.guest.(fragmenter); ok {
				got, err = f.fragments(v.ctx, test.message, test.cuts)
			} else {
				pings = s.lastPings
				got, err = s.echo(v.ctx, test.message)
			}
			if err != nil || got != want {
				t.Fatalf("echo: got %+v, %v; want %+v", got, err, want)
			}
			v.waitCounts(1)
			r := v.leave(ending{Code: 1000})
			if len(r.clientPings()) != pings {
				t.Errorf("pings that reached the backend: got %q, want %d", r.Pings, pings)
			}
			if len(r.Pongs) != len(cuts) {
				t.Errorf("pongs that came back to the backend: got %q, want %d", r.Pongs, len(cuts))
			}
		})
	}
}

// A code and reason by which the client closes reach the backend as they are.
func (s *stay) testClientCloses(t *testing.T) {
	for _, e := range endings(s.codes) {
		t.Run(describe(e), func(t *testing.T) {
			v, err := s.begin(t, "/echo", nil, target{})
			if err != nil {
				t.Fatal(err)
			}
			v.leave(e)
		})
	}
}

// A code and reason by which the backend closes reach the client as they are,
// although they may come together with the handshake.
func (s *stay) testBackendCloses(t *testing.T) {
	for _, e := range endings([]uint16{1000, 1001, 1005, 3000, 4999}) {
		t.Run(describe(e), func(t *testing.T) {
			v, err := s.begin(t, "/close", url.Values{"code": {strconv.Itoa(int(e.Code))}, "reason": {e.Reason}}, target{})
			if err != nil {
				t.Fatal(err)
			}
			e.Clean = true
			if got, err := s.closed(v.ctx); err != nil || got != e {
				t.Errorf("close, as the client sees it: got %+v, %v; want %+v", got, err, e)
			}
			v.finish(e, "backend_closed")
		})
	}
}

// endings are the codes, each without a reason and with the longest one. Code
// 1005 stands for a close frame without a code, which has no reason either.
func endings(codes []uint16) []ending {
	var all []ending
	for _, code := range codes {
		all = append(all, ending{Code: code})
		if code != 1005 {
			all = append(all, ending{Code: code, Reason: strings.Repeat("€", 41)})
		}
	}
	return all
}

// A backend's greeting, which may come together with the handshake, is the
// client's first message.
func (s *stay) testGreeting(t *testing.T) {
	v, err := s.begin(t, "/greet", nil, target{})
	if err != nil {
		t.Fatal(err)
	}
	want := received("text", []byte("hello"))
	if got, err := s.next(v.ctx); err != nil || got != want {
		t.Errorf("greeting: got %+v, %v; want %+v", got, err, want)
	}
	v.leave(ending{Code: 1000})
}

// clientPings are the pings that the client sent: those of the proxy's own end with a
// number in binary, which no client in these tests sends.
func (r report) clientPings() []string {
	return slices.DeleteFunc(slices.Clone(r.Pings), func(p string) bool { return strings.Contains(p, "\x00\x00\x00\x00") })
}
