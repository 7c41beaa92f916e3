// This file holds connections of gorilla/websocket.
package main

import (
	"errors"
	"net/http"
	"sync"
	"time"

	"github.com/gorilla/websocket"
)

// gorillaPeer is a peer.
type gorillaPeer struct {
	conn *websocket.Conn
	mu   sync.Mutex // held while a message is written
}

func (b *backend) acceptGorilla(w http.ResponseWriter, r *http.Request) (peer, error) {
	upgrader := websocket.Upgrader{
		CheckOrigin:       func(*http.Request) bool { return true },
		EnableCompression: b.compress,
	}
	header := http.Header{}
	if names := offered(r); b.subprotocol != "" {
		header.Set("Sec-WebSocket-Protocol", b.subprotocol)
	} else if len(names) > 0 {
		header.Set("Sec-WebSocket-Protocol", names[0])
	}
	// With upgrader.Subprotocols unset, the header is taken as it is.
	conn, err := upgrader.Upgrade(w, r, header)
	if err != nil {
		return nil, err
	}
	p := &gorillaPeer{conn: conn}
	switch b.answerPings {
	case "none":
		conn.SetPingHandler(func(string) error { return nil })
	case "latest":
		l := &latestPing{peer: p, delay: b.pongDelay}
		conn.SetPingHandler(l.received)
	}
	return p, nil
}

func (p *gorillaPeer) read() (bool, []byte, error) {
	kind, data, err := p.conn.ReadMessage()
	return kind == websocket.BinaryMessage, data, err
}

func (p *gorillaPeer) write(binary bool, data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	kind := websocket.TextMessage
	if binary {
		kind = websocket.BinaryMessage
	}
	return p.conn.WriteMessage(kind, data)
}

// sendClose needs no more than what the library has: it goes on reading, and drops
// what it would answer.
func (p *gorillaPeer) sendClose(code int, reason string) error {
	return p.conn.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(closeTimeout))
}

func (*gorillaPeer) code(err error) int {
	if e, ok := errors.AsType[*websocket.CloseError](err); ok {
		return e.Code
	}
	return websocket.CloseAbnormalClosure
}

func (p *gorillaPeer) drop() { _ = p.conn.Close() }

// latestPing answers the newest ping some time after the oldest that is unanswered,
// and none of those in between.
type latestPing struct {
	peer  *gorillaPeer
	delay time.Duration

	mu      sync.Mutex // protects the fields below
	waiting bool
	payload string
}

func (l *latestPing) received(payload string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.payload = payload
	if !l.waiting {
		l.waiting = true
		time.AfterFunc(l.delay, l.answer)
	}
	return nil
}

func (l *latestPing) answer() {
	l.mu.Lock()
	payload := l.payload
	l.waiting = false
	l.mu.Unlock()
	// A peer that is gone is found by reading.
	_ = l.peer.conn.WriteControl(websocket.PongMessage, []byte(payload), time.Now().Add(closeTimeout))
}
