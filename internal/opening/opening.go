// Package opening brings a connection from its admission to its session: it finds
// an upstream that accepts the handshake, before the client is told anything.
//
// An Opening owns the connection's record until the session does. The record's
// end, and the client's going away, cancel what is being dialed; every
// connection that was dialed is closed unless it became a leg of the session.
package opening

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// ErrNoUpstream is the error of an opening for which there was nobody to ask.
var ErrNoUpstream = errors.New("no upstream available")

// ErrEnded is the error of an opening whose end was decided elsewhere.
var ErrEnded = errors.New("connection ended before it was open")

// Config is what an opening needs to know.
type Config struct {
	// Next chooses the upstream to try, and returns nil if none is left. It may wait
	// for one.
	Next func(ctx context.Context) *pool.Target
	// Tried is told of every upstream that was dialed, and how long it took to
	// answer or, with an error, that it gave no answer that is of use.
	Tried func(t *pool.Target, took time.Duration, err error)
	// Limits of one attempt.
	DialTimeout, HandshakeTimeout time.Duration
	Concurrency                   int // re-dials at once per upstream
	Logger                        *zap.Logger
}

// Opening owns a record that has no session yet.
type Opening struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	handed chan struct{}  // closed by handover, or Close
	owner  registry.Owner // whose the record is after that; nil if it is over

	mu  sync.Mutex     // for those who know the record already while Admit returns it
	rec *registry.Conn // nil until then
	end *time.Timer    // of what is planned; nil while nothing is, and after handed
}

// New returns an opening that ends with ctx, the client's request.
func New(ctx context.Context) *Opening {
	o := &Opening{handed: make(chan struct{})}
	o.ctx, o.cancel = context.WithCancelCause(ctx)
	return o
}

// Admit makes the connection's record.
func (o *Opening) Admit(reg *registry.Registry, route *registry.Route, info registry.Info) error {
	rec, err := reg.Admit(route, info, o)
	if err != nil {
		return err
	}
	o.mu.Lock()
	o.rec = rec
	o.mu.Unlock()
	o.Reconsider() // what was planned meanwhile
	return nil
}

// record is what is known by the record's id before Admit has returned: nil then.
func (o *Opening) record() *registry.Conn {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.rec
}

// ID is the connection's id.
func (o *Opening) ID() string { return o.rec.ID() }

// End implements registry.Owner.
func (o *Opening) End(registry.Ending) { o.cancel(ErrEnded) }

// Abort implements registry.Owner.
func (o *Opening) Abort() { o.cancel(ErrEnded) }

// Reconsider implements registry.Owner: a planned end does not wait for upstreams.
func (o *Opening) Reconsider() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.rec == nil || o.isHanded() {
		return
	}
	o.stopEnd()
	if at, _ := o.rec.PlannedEnd(); !at.IsZero() {
		o.end = time.AfterFunc(time.Until(at), o.endAsPlanned)
	}
}

// endAsPlanned ends the connection, unless that is not planned any more.
func (o *Opening) endAsPlanned() {
	if at, why := o.rec.PlannedEnd(); !at.IsZero() && !time.Now().Before(at) {
		o.rec.Close(why)
	}
}

// stopEnd lets nothing end as planned. mu is held.
func (o *Opening) stopEnd() {
	if o.end != nil {
		o.end.Stop()
		o.end = nil
	}
}

func (o *Opening) isHanded() bool {
	select {
	case <-o.handed:
		return true
	default:
		return false
	}
}

// Move implements registry.Owner. A client whose connection is open has been told
// so before the session has it: for that moment Move waits.
func (o *Opening) Move() error {
	if rec := o.record(); rec == nil || rec.State() != registry.Open {
		return session.ErrNotMovable
	}
	if <-o.handed; o.owner == nil {
		return session.ErrNotMovable
	}
	return o.owner.Move()
}

// handover gives the record to what was opened.
func (o *Opening) handover(to registry.Owner) {
	o.rec.Handover(to)
	o.owner = to
	o.leave()
}

// leave says that the record is not the opening's any more.
func (o *Opening) leave() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.stopEnd()
	close(o.handed)
}

// Close ends an opening that did not become a session.
func (o *Opening) Close() {
	o.cancel(nil)
	o.leave()
	o.rec.Done()
}

// Reach tries upstreams until one gives an answer that settles the matter. If
// none does, the last one's answer is the client's, or else its error.
func (o *Opening) Reach(c Config, q *handshake.Request) (*Answer, error) {
	var last *Answer
	err := ErrNoUpstream
	for {
		t := c.Next(o.ctx)
		if t == nil {
			if last != nil {
				return last, nil
			}
			return nil, err
		}
		if last != nil {
			_ = last.conn.Close()
			last = nil
		}
		o.rec.Attempt(t.Place, t.Addr.Dial(), time.Now().Add(c.DialTimeout+c.HandshakeTimeout))
		var a *Answer
		a, err = c.ask(o.ctx, t, q)
		o.rec.Attempted()
		if err != nil {
			if l := c.Logger.Check(zap.DebugLevel, "upstream gave no answer"); l != nil {
				l.Write(zap.String("id", o.ID()), zap.String("upstream", t.Place.Name()), zap.String("dial", t.Addr.Dial()), zap.Error(err))
			}
			if o.ctx.Err() != nil {
				return nil, context.Cause(o.ctx)
			}
			continue
		}
		if a.res.Upgraded || !tryNext(a.res.HTTP.StatusCode) {
			return a, nil
		}
		last = a
	}
}

// tryNext reports whether another backend may do better than one that gave this
// status: 502 to 504 are about the way to an application, not its answer.
func tryNext(status int) bool {
	return status >= http.StatusBadGateway && status <= http.StatusGatewayTimeout
}

// errUnusable is what counts as a failure of an upstream whose answer is the way's,
// not the application's.
var errUnusable = errors.New("the upstream has no application behind it")

// ask dials an upstream, does the handshake, and tells of it, unless it was given up.
func (c *Config) ask(ctx context.Context, t *pool.Target, q *handshake.Request) (*Answer, error) {
	began := time.Now()
	a, err := c.dial(ctx, t, q)
	switch {
	case ctx.Err() != nil:
	case err == nil && !a.res.Upgraded && tryNext(a.res.HTTP.StatusCode):
		c.Tried(t, time.Since(began), errUnusable)
	default:
		c.Tried(t, time.Since(began), err)
	}
	return a, err
}

func (c *Config) dial(ctx context.Context, t *pool.Target, q *handshake.Request) (*Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, c.DialTimeout+c.HandshakeTimeout)
	defer cancel()
	conn, err := t.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dialing %s: %w", t.Addr.Dial(), err)
	}
	_ = conn.SetDeadline(time.Now().Add(c.HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(past) })
	res, err := q.Do(conn, handshake.Upstream{Network: t.Addr.Network(), Address: t.Addr.Dial()})
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("handshake with %s: %w", t.Addr.Dial(), err)
	}
	return &Answer{request: q, res: res, conn: conn, place: t.Place, extra: t.Header, stall: c.HandshakeTimeout}, nil
}

// past is a deadline that ends blocked reads and writes at once.
var past = time.Unix(1, 0)

// statusClientClosed is what nginx and Caddy log for a client that left before
// it was answered.
const statusClientClosed = 499

// Status is the HTTP status for a client whose opening failed with err.
func (o *Opening) Status(err error) int {
	var timeout net.Error
	switch {
	case errors.Is(err, ErrNoUpstream):
		return http.StatusServiceUnavailable
	case errors.Is(err, http.ErrNotSupported): // there is no connection to take over
		return http.StatusInternalServerError
	case o.ctx.Err() != nil:
		return statusClientClosed
	case errors.As(err, &timeout) && timeout.Timeout():
		return http.StatusGatewayTimeout
	default:
		return http.StatusBadGateway
	}
}
