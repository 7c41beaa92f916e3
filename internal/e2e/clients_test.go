// This file holds what every client that nobody here wrote has to see through the
// proxy, whichever library the backend was written with.

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// guest is a client, of one WebSocket at a time.
type guest interface {
	// visit makes ready to talk to a proxy.
	visit(ctx context.Context, p *proxy) error
	open(ctx context.Context, to target) (opened, error)
	// echo sends a message and returns the next one that comes.
	echo(ctx context.Context, m content) (message, error)
	// next returns the next message that comes.
	next(ctx context.Context) (message, error)
	// close begins the closing handshake and returns its outcome.
	close(ctx context.Context, e ending) (ending, error)
	// closed waits until the peer has closed.
	closed(ctx context.Context) (ending, error)
}

// fragmenter is a guest that can send fragments. After each but the last it
// pings, and waits for the pong before it goes on.
type fragmenter interface {
	fragments(ctx context.Context, m content, cuts []int) (message, error)
}

// habits are what guests differ in.
type habits struct {
	offers     bool     // permessage-deflate, even unasked
	needsReply bool     // gives up if it offers subprotocols and none is picked
	lastPings  int      // sent before it closes
	codes      []uint16 // what it can close with
}

// target says what to open.
type target struct {
	URL       string   `json:"url"`
	Protocols []string `json:"protocols"`
	Compress  bool     `json:"compress"`
}

// opened is what the client knows after the handshake.
type opened struct {
	Protocol   string `json:"protocol"`
	Extensions string `json:"extensions"`
}

// ending is how a connection was closed.
type ending struct {
	Code   uint16 `json:"code"`
	Reason string `json:"reason"`
	Clean  bool   `json:"clean"` // a closing handshake was completed
}

// content describes a message; client.js makes the same bytes of it.
type content struct {
	Kind  string `json:"kind"` // text or binary
	Size  int    `json:"size"`
	Plain bool   `json:"plain"` // compresses very well
}

// message is a message that was received.
type message struct {
	Kind string `json:"kind"`
	Size int    `json:"size"`
	Sum  string `json:"sum"` // SHA-256
}

func received(kind string, data []byte) message {
	sum := sha256.Sum256(data)
	return message{kind, len(data), hex.EncodeToString(sum[:])}
}

// bytes makes the message: noise, in text letters with a multi-byte character
// after every four, so that some are cut wherever the message is.
func (m content) bytes() []byte {
	const words = "hold fast, "
	p := make([]byte, m.Size)
	state := uint32(1)
	for i := range p {
		state = state*1664525 + 1013904223
		switch {
		case m.Plain:
			p[i] = words[i%len(words)]
		case m.Kind == "text":
			p[i] = 'a' + byte(state>>24)%26
		default:
			p[i] = byte(state >> 24)
		}
	}
	for i := 4; m.Kind == "text" && !m.Plain && i+3 <= len(p); i += 7 {
		copy(p[i:], "€")
	}
	return p
}

// sums are the messages that content stands for.
var sums sync.Map // content to message

// message returns what who receives m has to get.
func (m content) message() message {
	if known, ok := sums.Load(m); ok {
		return known.(message)
	}
	want := received(m.Kind, m.bytes())
	sums.Store(m, want)
	return want
}

// report is what a backend saw of a connection, once that has ended.
type report struct {
	Offered  []string `json:"offered"` // subprotocols
	Offer    string   `json:"offer"`   // extensions
	Protocol string   `json:"protocol"`
	Pings    []string `json:"pings"` // payloads
	Pongs    []string `json:"pongs"`
	Code     uint16   `json:"code"`
	Reason   string   `json:"reason"`
	Error    string   `json:"error"`
}

// hosts are the backends, by the library they were written with. Each serves
// /echo; /fragments?cuts=, which answers with the message in fragments, a ping
// after each; /greet and /close?code=&reason=, which closes at once; and /report.
// They pick the subprotocol in ?protocol=, and compress with ?compress=1.
var hosts = []struct {
	name    string
	start   func(t testing.TB) (addr string)
	biggest int // message that is compressed; the race detector slows Go's compress/flate
}{
	{"ws", startWSBackend, 16 << 20},
	{"coder", startCoderBackend, 1 << 20},
}

// page is what a browser gets that asks for the site.
const page = `header / Content-Type text/html
	respond / "<!doctype html><title>Holdfast</title>"`

// testGuest shows that g works with every backend, in every way.
func testGuest(t *testing.T, g guest, h habits) {
	for _, host := range hosts {
		t.Run(host.name, func(t *testing.T) {
			backend := host.start(t)
			p := startCaddy(t, "", "websocket_proxy "+backend+" {\n resume_on 1012 1013\n}\n\t"+page)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := g.visit(ctx, p); err != nil {
				t.Fatal(err)
			}
			s := &stay{proxy: p, guest: g, habits: h, backend: backend, biggest: host.biggest}
			t.Run("messages", s.testMessages)
			t.Run("subprotocol", s.testSubprotocol)
			t.Run("compression", s.testCompression)
			t.Run("greeting", s.testGreeting)
			t.Run("fragments", s.testFragments)
			t.Run("client closes", s.testClientCloses)
			t.Run("backend closes", s.testBackendCloses)
		})
	}
}

// stay is a guest at a proxy with one backend.
type stay struct {
	*proxy
	guest
	habits
	backend string
	biggest int
}

// cases numbers the connections, so that a backend can tell them apart.
var cases atomic.Uint64

// visitCase is one connection of a stay.
type visitCase struct {
	*stay
	t      testing.TB
	ctx    context.Context
	key    string
	before stats
	opened opened
}

// arrive begins a case, with its deadline.
func (s *stay) arrive(t testing.TB) *visitCase {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // the race detector is slow at compressing
	t.Cleanup(cancel)
	return &visitCase{stay: s, t: t, ctx: ctx, key: strconv.FormatUint(cases.Add(1), 10), before: s.stats(t)}
}

// begin begins a case and opens its connection. Path and query say what the
// backend is to do.
func (s *stay) begin(t testing.TB, path string, query url.Values, to target) (*visitCase, error) {
	t.Helper()
	v := s.arrive(t)
	if query == nil {
		query = url.Values{}
	}
	query.Set("case", v.key)
	if to.Compress {
		query.Set("compress", "1")
	}
	to.URL = "ws://" + s.addr + path + "?" + query.Encode()
	var err error
	v.opened, err = s.open(v.ctx, to)
	return v, err
}

// connection is what the admin API shows of the case.
func (v *visitCase) connection() connection {
	v.t.Helper()
	list := v.connections(v.t)
	if len(list) != 1 || !strings.Contains(list[0].URI, "case="+v.key) {
		v.t.Fatalf("connections: got %+v, want the one with case=%s", list, v.key)
	}
	return list[0]
}

// leave closes from the client, checks how that ended on every side, and returns
// the backend's report.
func (v *visitCase) leave(e ending) report {
	v.t.Helper()
	e.Clean = true
	if got, err := v.close(v.ctx, e); err != nil || got != e {
		v.t.Errorf("close, as the client sees it: got %+v, %v; want the backend's echo of %+v", got, err, e)
	}
	return v.finish(e, "client_closed")
}

// finish checks that the backend saw the connection end in the given way, that
// the registry gives the reason for it, and that nothing is left.
func (v *visitCase) finish(e ending, reason string) report {
	v.t.Helper()
	r := v.report()
	if r.Code != e.Code || r.Reason != e.Reason || r.Error != "" {
		v.t.Errorf("close, as the backend sees it: got %d %q %s, want %d %q", r.Code, r.Reason, r.Error, e.Code, e.Reason)
	}
	v.ended(reason)
	return r
}

// ended checks that nothing is left of the case, and for which reasons connections
// have ended since it began.
func (v *visitCase) ended(reasons ...string) {
	v.t.Helper()
	v.waitEmpty(v.t)
	want := maps.Clone(v.before.ClosedByReason)
	for _, reason := range reasons {
		want[reason]++
	}
	if got := v.stats(v.t).ClosedByReason; !maps.Equal(got, want) {
		v.t.Errorf("closed by reason: got %v, want %v: %q more", got, want, reasons)
	}
}

// report asks the backend what it saw of the case, once that has ended there.
func (v *visitCase) report() (r report) {
	v.t.Helper()
	req, err := http.NewRequestWithContext(v.ctx, http.MethodGet, "http://"+v.backend+"/report?case="+v.key, nil)
	if err != nil {
		v.t.Fatal(err)
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		v.t.Fatalf("the backend does not see the end: %v", err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&r); err != nil {
		v.t.Fatal(err)
	}
	return r
}

// echoes has every message echoed.
func (v *visitCase) echoes(messages []content) {
	v.t.Helper()
	for _, m := range messages {
		want := m.message()
		if got, err := v.echo(v.ctx, m); err != nil || got != want {
			v.t.Fatalf("echo of %+v: got %+v, %v; want %+v", m, got, err, want)
		}
	}
}

// waitCounts waits until the API has counted all that passed, and returns the
// connection: it may count a message a moment after that was delivered.
func (v *visitCase) waitCounts(messages uint64) connection {
	v.t.Helper()
	var c connection
	if !eventually(20*time.Second, func() bool {
		c = v.connection()
		return c.MessagesIn == messages && c.MessagesOut == messages
	}) {
		v.t.Errorf("messages: got %d in, %d out, want %d each", c.MessagesIn, c.MessagesOut, messages)
	}
	return c
}

func describe(e ending) string { return fmt.Sprintf("%d with %d bytes", e.Code, len(e.Reason)) }
