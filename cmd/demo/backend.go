// This file holds the backend: a WebSocket server that says who it is and
// sends every text back with its name. It knows nothing of Holdfast but two
// headers of the handshake.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// subprotocol is what the page offers and every backend takes, to show that
// the proxy passes the negotiation on.
const subprotocol = "holdfast-demo"

const (
	// The longest text that is taken, in bytes.
	maxText = 32 << 10
	// A peer that does not take an answer for this long is given up.
	answerTimeout = 10 * time.Second
	// How long sessions have for their closing handshake when the backend stops.
	goodbyeTimeout = 2 * time.Second
)

// hello is the first message of every session. Holdfast may bring a
// connection to another backend in mid-life; the page then gets a second one.
type hello struct {
	Backend string `json:"backend"`
	// What Holdfast calls the connection, to find it in the registry.
	Connection string `json:"connection"`
	// Why this backend took over, empty when it is the first.
	Resume string `json:"resume,omitempty"`
}

// answer is the echo of one text. N counts the texts of this session, so it
// starts again at 1 when another backend takes over.
type answer struct {
	Backend string `json:"backend"`
	Text    string `json:"text"`
	N       int    `json:"n"`
}

type backend struct {
	name string
	stop context.Context // done when the backend is to end

	mu       sync.Mutex // protects stopping, and orders sessions.Add before Wait
	stopping bool
	sessions sync.WaitGroup
}

// runBackend serves on listen until ctx ends or stdin does: the parent holds
// the other end of stdin, so a backend never outlives it, however it dies.
// The address is the one line that goes to stdout.
func runBackend(ctx context.Context, name, listen string, stdin io.Reader, stdout io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ln, err := net.Listen("tcp", listen)
	if err != nil {
		return fmt.Errorf("backend %s: %w", name, err)
	}
	b := &backend{name: name, stop: ctx}
	server := &http.Server{Handler: b, ReadHeaderTimeout: 10 * time.Second}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	go b.endWith(stdin, cancel)
	fmt.Fprintf(stdout, "%s\n", ln.Addr())

	err = server.Serve(ln)
	cancel()
	b.sayGoodbye()
	if !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("backend %s: %w", name, err)
	}
	return nil
}

// endWith reads stdin until its end and then cancels. It owns stdin; when the
// backend ends for another reason, the end of the process ends it.
func (b *backend) endWith(stdin io.Reader, cancel context.CancelFunc) {
	_, _ = bufio.NewReader(stdin).WriteTo(io.Discard)
	cancel()
}

// sayGoodbye waits, for a while, until every session has closed.
func (b *backend) sayGoodbye() {
	b.mu.Lock()
	b.stopping = true
	b.mu.Unlock()
	done := make(chan struct{})
	go b.awaitSessions(done)
	select {
	case <-done:
	case <-time.After(goodbyeTimeout):
	}
}

// awaitSessions closes done when the last session has ended; sessions that
// take longer than goodbyeTimeout end with the process, and so does it.
func (b *backend) awaitSessions(done chan<- struct{}) {
	b.sessions.Wait()
	close(done)
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	if b.stopping {
		b.mu.Unlock()
		http.Error(w, "stopping", http.StatusServiceUnavailable)
		return
	}
	b.sessions.Add(1)
	b.mu.Unlock()
	defer b.sessions.Done()

	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return // Upgrade has answered
	}
	defer conn.Close()
	conn.SetReadLimit(maxText)
	s := &session{backend: b.name, conn: conn}
	conn.SetCloseHandler(s.echoClose)
	// 1001 tells the proxy that this backend goes away and the session may
	// go on elsewhere.
	defer context.AfterFunc(b.stop, func() {
		s.goodbye(websocket.CloseGoingAway, "backend "+b.name+" is stopping")
	})()

	s.converse(hello{
		Backend:    b.name,
		Connection: r.Header.Get("Holdfast-Connection"),
		Resume:     r.Header.Get("Holdfast-Resume"),
	})
}

var upgrader = websocket.Upgrader{
	Subprotocols:      []string{subprotocol},
	EnableCompression: true,
}

// session is one WebSocket of a backend.
type session struct {
	backend string
	conn    *websocket.Conn
	writing sync.Mutex // held for a message: a close frame inside it would tear it
}

// converse greets and then answers text by text until either side closes. It
// answers each text and each ping before it reads on, so what a pong tells the
// proxy to be read is answered as well.
func (s *session) converse(greeting hello) {
	if s.send(greeting) != nil {
		return
	}
	for n := 1; ; n++ {
		kind, text, err := s.conn.ReadMessage()
		if _, closed := errors.AsType[*websocket.CloseError](err); closed {
			_ = s.tcp().SetLinger(-1) // all is answered: no reset, see goodbye
		}
		if err != nil {
			return
		}
		if kind != websocket.TextMessage {
			s.goodbye(websocket.CloseUnsupportedData, "only text is echoed")
			continue // to the peer's close frame
		}
		if s.send(answer{Backend: s.backend, Text: string(text), N: n}) != nil {
			return
		}
	}
}

// goodbye sends a close frame. After it nothing can be answered any more (RFC 6455
// §5.5.1), but texts may still be on their way, so converse reads on. If the peer's
// close frame comes next, all was answered; the connection's end in good order is
// the proof, and the proxy repeats nothing. If a text comes next, it must not count
// as read: the connection is reset, and the proxy replays to the next backend what
// no pong has acknowledged.
func (s *session) goodbye(code int, reason string) {
	s.writing.Lock()
	defer s.writing.Unlock()
	_ = s.tcp().SetLinger(0) // a reset, also if the process ends first
	_ = s.conn.SetReadDeadline(time.Now().Add(goodbyeTimeout))
	_ = s.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(goodbyeTimeout))
}

// echoClose answers the peer's close frame with the same code and reason, which
// the page shows.
func (s *session) echoClose(code int, reason string) error {
	_ = s.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(goodbyeTimeout))
	return nil // converse ends anyway
}

func (s *session) tcp() *net.TCPConn { return s.conn.NetConn().(*net.TCPConn) }

func (s *session) send(message any) error {
	payload, err := json.Marshal(message)
	if err != nil {
		return err
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	_ = s.conn.SetWriteDeadline(time.Now().Add(answerTimeout))
	return s.conn.WriteMessage(websocket.TextMessage, payload)
}
