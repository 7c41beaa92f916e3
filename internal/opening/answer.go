package opening

import (
	"context"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/hijack"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Answer is an upstream's answer to the handshake, with its connection. One of
// Relay and Upgrade follows, as Upgraded says.
type Answer struct {
	request *handshake.Request
	res     *handshake.Response
	conn    net.Conn
	place   *registry.Upstream
	extra   http.Header   // what the selection policy tells the client
	stall   time.Duration // how long the body of a refusal may pause
}

// Upgraded reports whether the upstream accepted the WebSocket.
func (a *Answer) Upgraded() bool { return a.res.Upgraded }

// Relay gives the client an answer that is no 101: status, header, which down may
// change, and body.
func (a *Answer) Relay(o *Opening, w http.ResponseWriter, down handshake.Down) {
	defer a.conn.Close()
	done, broken := make(chan struct{}), make(chan struct{}) // closed by Relay, and by the end of breakOff
	stop := context.AfterFunc(o.ctx, func() {
		defer close(broken)
		a.breakOff(w, done)
	})
	defer func() {
		close(done)
		if !stop() {
			<-broken // nobody touches w after its handler
		}
	}()
	a.res.RelayHeader(w.Header(), down)
	handshake.CopyHeader(w.Header(), a.extra)
	w.WriteHeader(a.res.HTTP.StatusCode)
	body := &patientReader{ctx: o.ctx, conn: a.conn, body: a.res.HTTP.Body, patience: a.stall}
	rc := http.NewResponseController(w)
	if _, err := io.Copy(flusher{w, rc}, body); err != nil {
		// The status goes out, also if none of the body came; only breaking off tells the
		// client that this is not all.
		_ = rc.Flush()
		panic(http.ErrAbortHandler)
	}
}

// breakOff ends what Relay waits for, a backend that says nothing or a client that does
// not read, until it is done. Once would not do: Caddy's write_idle_timeout sets a
// deadline with each write, which may come after ours.
func (a *Answer) breakOff(w http.ResponseWriter, done <-chan struct{}) {
	_ = a.conn.SetDeadline(past)
	again := time.NewTicker(breakOffPeriod)
	defer again.Stop()
	for {
		hijack.FailWrites(w)
		select {
		case <-done:
			return
		case <-again.C:
		}
	}
}

// breakOffPeriod is how often a write to the client is ended that may have begun anew.
const breakOffPeriod = 100 * time.Millisecond

// patientReader reads a body that may come slowly but must not pause for long.
type patientReader struct {
	ctx      context.Context
	conn     net.Conn
	body     io.Reader
	patience time.Duration
}

func (p *patientReader) Read(b []byte) (int, error) {
	_ = p.conn.SetReadDeadline(time.Now().Add(p.patience))
	// Looked at after the deadline was set: it may have replaced the one in the past.
	if err := p.ctx.Err(); err != nil {
		return 0, err
	}
	return p.body.Read(b)
}

// flusher passes on what was written at once.
type flusher struct {
	w  io.Writer
	rc *http.ResponseController
}

func (f flusher) Write(b []byte) (int, error) {
	n, err := f.w.Write(b)
	if err == nil {
		err = f.rc.Flush()
	}
	return n, err
}

// Upgrade gives the client its 101, whose header down may change, takes its
// connection over, and makes the session, which owns the record from then on and is
// to be run. addresses are those that placeholders made.
func (a *Answer) Upgrade(o *Opening, w http.ResponseWriter, r *http.Request, down handshake.Down, route Pool, addresses map[string]pool.Address) (*session.Session, error) {
	// Before the 101: a client that has it finds its connection open in the registry.
	if !o.rec.Open(a.res.Subprotocol) {
		_ = a.conn.Close()
		return nil, ErrEnded
	}
	a.res.AnswerHeader(w.Header(), r.Header.Get("Sec-WebSocket-Key"), down)
	handshake.CopyHeader(w.Header(), a.extra)
	conn, early, err := hijack.SwitchProtocols(w)
	if err != nil {
		_ = a.conn.Close()
		o.rec.Close(registry.Ending{Reason: registry.ClientGone})
		return nil, err
	}
	s := session.New(o.rec, newLine(o.rec, route, a, addresses), a.place,
		session.Peer{Conn: conn, Early: early},
		session.Peer{Conn: a.conn, Early: a.res.Early},
		a.res.Compression.Compressed())
	o.handover(s)
	return s, nil
}
