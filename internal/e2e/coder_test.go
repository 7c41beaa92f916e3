// This file holds the client and the backend written with coder/websocket.

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
)

func TestCoderClient(t *testing.T) {
	testGuest(t, new(coderGuest), habits{lastPings: 1, codes: []uint16{1000, 1001, 1005, 3000, 4999}})
}

// coderGuest is a guest.
type coderGuest struct {
	conn  *websocket.Conn
	inbox chan message
	ended chan ending // gets one, and is closed
}

func (*coderGuest) visit(context.Context, *proxy) error { return nil }

func (g *coderGuest) open(ctx context.Context, to target) (opened, error) {
	opts := &websocket.DialOptions{Subprotocols: to.Protocols}
	if to.Compress {
		opts.CompressionMode = websocket.CompressionContextTakeover
	}
	conn, res, err := websocket.Dial(ctx, to.URL, opts)
	if err != nil {
		return opened{}, err
	}
	conn.SetReadLimit(-1)
	g.conn, g.inbox, g.ended = conn, make(chan message, 1), make(chan ending, 1) // read ahead by one
	go g.read(ctx, conn, g.inbox, g.ended)
	return opened{conn.Subprotocol(), res.Header.Get("Sec-WebSocket-Extensions")}, nil
}

// read owns reading conn, which also answers pings. It ends with the connection
// or ctx, and closes both channels.
func (g *coderGuest) read(ctx context.Context, conn *websocket.Conn, inbox chan<- message, ended chan<- ending) {
	defer close(inbox)
	defer close(ended)
	defer func() { _ = conn.CloseNow() }()
	for {
		m, err := readCoder(ctx, conn)
		if err != nil {
			ended <- coderEnding(err)
			return
		}
		select {
		case inbox <- received(m.kind, m.data):
		case <-ctx.Done():
			return
		}
	}
}

func (g *coderGuest) next(context.Context) (message, error) {
	m, ok := <-g.inbox
	if !ok {
		return m, errors.New("the connection has ended")
	}
	return m, nil
}

func (g *coderGuest) echo(ctx context.Context, m content) (message, error) {
	if err := g.conn.Write(ctx, coderType(m.Kind), m.bytes()); err != nil {
		return message{}, err
	}
	return g.next(ctx)
}

func (g *coderGuest) fragments(ctx context.Context, m content, cuts []int) (message, error) {
	if err := writeFragments(ctx, g.conn, coderMessage{m.Kind, m.bytes()}, cuts, func() {}); err != nil {
		return message{}, err
	}
	return g.next(ctx)
}

func (g *coderGuest) close(ctx context.Context, e ending) (ending, error) {
	// Close may read the answer itself, and tells its code only. Once a pong has
	// come it cannot: the other reader is at it, and stays.
	if err := g.conn.Ping(ctx); err != nil {
		return ending{}, err
	}
	if err := g.conn.Close(websocket.StatusCode(e.Code), e.Reason); err != nil {
		return ending{}, err
	}
	return g.closed(ctx)
}

func (g *coderGuest) closed(context.Context) (ending, error) {
	e, ok := <-g.ended
	if !ok {
		return e, errors.New("no close frame came in time")
	}
	return e, nil
}

// coderMessage is a message and its bytes.
type coderMessage struct {
	kind string
	data []byte
}

func readCoder(ctx context.Context, conn *websocket.Conn) (coderMessage, error) {
	typ, data, err := conn.Read(ctx)
	return coderMessage{map[websocket.MessageType]string{websocket.MessageText: "text", websocket.MessageBinary: "binary"}[typ], data}, err
}

func coderType(kind string) websocket.MessageType {
	if kind == "text" {
		return websocket.MessageText
	}
	return websocket.MessageBinary
}

// coderEnding is what a failed read says about the end.
func coderEnding(err error) ending {
	if e, ok := errors.AsType[websocket.CloseError](err); ok {
		return ending{Code: uint16(e.Code), Reason: e.Reason, Clean: true}
	}
	return ending{Code: 1006, Reason: err.Error()}
}

// writeFragments writes a message cut at the given places, with a ping after each
// fragment but the last. It goes on, and calls answered, when the pong has come.
// Somebody must be reading.
func writeFragments(ctx context.Context, conn *websocket.Conn, m coderMessage, cuts []int, answered func()) error {
	w, err := conn.Writer(ctx, coderType(m.kind))
	if err != nil {
		return err
	}
	from := 0
	for _, cut := range cuts {
		if _, err := w.Write(m.data[from:cut]); err != nil {
			return err
		}
		if err := conn.Ping(ctx); err != nil {
			return err
		}
		answered()
		from = cut
	}
	if _, err := w.Write(m.data[from:]); err != nil {
		return err
	}
	return w.Close()
}

// coderBackend is a backend. See hosts for what it does.
type coderBackend struct {
	mu      sync.Mutex
	reports map[string]chan report // by the number in ?case=; each gets one
}

func startCoderBackend(t testing.TB) string {
	t.Helper()
	srv := newCoderServer(t)
	srv.Start()
	return srv.Listener.Addr().String()
}

// newCoderServer returns a coderBackend's server, which is to be started. It ends when
// the test does.
func newCoderServer(t testing.TB) *httptest.Server {
	t.Helper()
	b := &coderBackend{reports: map[string]chan report{}}
	var running sync.WaitGroup
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		defer running.Done()
		b.ServeHTTP(w, r)
	}))
	t.Cleanup(func() { srv.Close(); running.Wait() })
	return srv
}

// reportOf returns where the report of a case is delivered.
func (b *coderBackend) reportOf(q url.Values) chan report {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := q.Get("case")
	if b.reports[key] == nil {
		b.reports[key] = make(chan report, 1)
	}
	return b.reports[key]
}

func (b *coderBackend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if r.URL.Path == "/report" {
		select {
		case rep := <-b.reportOf(q):
			_ = json.NewEncoder(w).Encode(rep)
		case <-r.Context().Done():
		}
		return
	}
	rep := report{Offered: []string{}, Pings: []string{}, Offer: r.Header.Get("Sec-WebSocket-Extensions")}
	if offered := r.Header.Get("Sec-WebSocket-Protocol"); offered != "" {
		for name := range strings.SplitSeq(offered, ",") {
			rep.Offered = append(rep.Offered, strings.TrimSpace(name))
		}
	}
	opts := &websocket.AcceptOptions{OnPingReceived: func(_ context.Context, payload []byte) bool {
		rep.Pings = append(rep.Pings, string(payload))
		return true
	}}
	if name := q.Get("protocol"); name != "" {
		opts.Subprotocols = []string{name}
	}
	if q.Get("compress") != "" {
		opts.CompressionMode = websocket.CompressionContextTakeover
	}
	conn, err := websocket.Accept(w, r, opts)
	if err != nil {
		rep.Error = err.Error()
	} else {
		rep.Protocol = conn.Subprotocol()
		serveCoder(conn, r.URL.Path, q, &rep)
	}
	b.reportOf(q) <- rep
}

// serveCoder does with conn what path and query say, until it has ended, and
// reports the end.
func serveCoder(conn *websocket.Conn, path string, q url.Values, rep *report) {
	// The request's context is of no use once the connection was hijacked.
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	defer func() { _ = conn.CloseNow() }()
	conn.SetReadLimit(-1)
	code, _ := strconv.Atoi(q.Get("code"))

	var writing sync.WaitGroup // what writes while this goroutine reads
	defer writing.Wait()
	if path == "/greet" {
		_ = conn.Write(ctx, websocket.MessageText, []byte("hello"))
	}
	if code != 0 {
		// Nil says that the answer has the same code; what else it has is not told.
		if err := conn.Close(websocket.StatusCode(code), q.Get("reason")); err != nil {
			rep.Error = err.Error()
			return
		}
		rep.Code, rep.Reason = uint16(code), q.Get("reason")
		return
	}
	for {
		m, err := readCoder(ctx, conn)
		if err != nil {
			end := coderEnding(err)
			rep.Code, rep.Reason = end.Code, end.Reason
			return
		}
		switch path {
		case "/echo":
			_ = conn.Write(ctx, coderType(m.kind), m.data)
		case "/fragments":
			writing.Go(func() {
				_ = writeFragments(ctx, conn, m, numbers(q.Get("cuts")), func() { rep.Pongs = append(rep.Pongs, "") })
			})
		}
	}
}

// numbers reads a comma-separated list.
func numbers(list string) (ns []int) {
	for s := range strings.SplitSeq(list, ",") {
		n, _ := strconv.Atoi(s)
		ns = append(ns, n)
	}
	return ns
}
