// This file holds connections of coder/websocket.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/coder/websocket"
)

// coderPeer is a peer.
type coderPeer struct {
	conn *websocket.Conn
	raw  *rawConn
	mu   sync.Mutex // held while a message is written
}

func (b *backend) acceptCoder(w http.ResponseWriter, r *http.Request) (peer, error) {
	opts := &websocket.AcceptOptions{
		InsecureSkipVerify: true,
		Subprotocols:       offered(r),
		OnPingReceived:     func(context.Context, []byte) bool { return b.answerPings == "all" },
	}
	if b.compress {
		opts.CompressionMode = websocket.CompressionContextTakeover
	}
	if b.windowBits != 0 {
		// The library's window is the largest there is: what it sends is not compressed.
		opts.CompressionThreshold = math.MaxInt
	}
	answer := &answer{ResponseWriter: w, subprotocol: b.subprotocol, windowBits: b.windowBits}
	conn, err := websocket.Accept(answer, r, opts)
	if err != nil {
		return nil, err
	}
	conn.SetReadLimit(-1)
	return &coderPeer{conn: conn, raw: answer.conn}, nil
}

func (p *coderPeer) read() (bool, []byte, error) {
	kind, data, err := p.conn.Read(context.Background())
	return kind == websocket.MessageBinary, data, err
}

func (p *coderPeer) write(binary bool, data []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	kind := websocket.MessageText
	if binary {
		kind = websocket.MessageBinary
	}
	return p.conn.Write(context.Background(), kind, data)
}

// sendClose goes behind the library's back. Its Close discards the messages that come
// after it, and a ping among them fails it.
func (p *coderPeer) sendClose(code int, reason string) error {
	p.mu.Lock() // no message is half written
	defer p.mu.Unlock()
	payload := append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...)
	return p.raw.finish(append([]byte{0x88, byte(len(payload))}, payload...))
}

func (*coderPeer) code(err error) int {
	if e, ok := errors.AsType[websocket.CloseError](err); ok {
		return int(e.Code)
	}
	return int(websocket.StatusAbnormalClosure)
}

func (p *coderPeer) drop() { _ = p.conn.CloseNow() }

// answer is the response to a handshake. It changes what the library would answer,
// and keeps the connection.
type answer struct {
	http.ResponseWriter
	subprotocol string
	windowBits  int
	conn        *rawConn // once it is hijacked
}

func (a *answer) WriteHeader(status int) {
	h := a.Header()
	if status == http.StatusSwitchingProtocols {
		if a.subprotocol != "" {
			h.Set("Sec-WebSocket-Protocol", a.subprotocol)
		}
		if extension := h.Get("Sec-WebSocket-Extensions"); extension != "" && a.windowBits != 0 && !strings.Contains(extension, "server_max_window_bits") {
			h.Set("Sec-WebSocket-Extensions", extension+"; server_max_window_bits="+strconv.Itoa(a.windowBits))
		}
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, brw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	a.conn = &rawConn{Conn: conn}
	return a.conn, bufio.NewReadWriter(brw.Reader, bufio.NewWriter(a.conn)), nil
}

// rawConn is the connection below the library. A message is written with the peer's
// mutex held, a control frame in one Write: finish never lands inside of either.
type rawConn struct {
	net.Conn

	mu       sync.Mutex // held while writing; protects finished
	finished bool
}

func (c *rawConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished {
		return len(p), nil // a pong, or the answer to the peer's close frame
	}
	return c.Conn.Write(p)
}

// finish writes p, and drops all that would come after it.
func (c *rawConn) finish(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.finished {
		return nil
	}
	c.finished = true
	_, err := c.Conn.Write(p)
	return err
}
