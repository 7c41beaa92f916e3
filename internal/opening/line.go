// This file holds what a live connection keeps for its next backends, and the
// dials to them.

package opening

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/deflate"
	"github.com/holdfast-proxy/caddy-holdfast/internal/handshake"
	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/session"
)

// Pool is a route as its live connections see it. Every call answers by the
// newest config.
type Pool interface {
	Settings() *session.Settings
	Leaves(upstream string) bool
	Others(upstream string) bool
	Lost(upstream *registry.Upstream)
	Unanswering(upstream *registry.Upstream)
	// Redial returns how to reach the route's upstreams once each: the one with the
	// key last comes last or, for a move, not at all. addresses are those that
	// placeholders made when the connection was opened.
	Redial(q *handshake.Request, addresses map[string]pool.Address, why pool.Why, last string) Config
}

// line is what a connection keeps of its opening: the session's Route.
type line struct {
	Pool
	rec       *registry.Conn
	request   *handshake.Request
	addresses map[string]pool.Address

	// What the client was told: every later backend has to agree.
	subprotocol string
	compression deflate.Agreement
}

func newLine(rec *registry.Conn, route Pool, a *Answer, addresses map[string]pool.Address) *line {
	return &line{Pool: route, rec: rec, request: a.request, addresses: addresses, subprotocol: a.res.Subprotocol, compression: a.res.Compression}
}

// errors of backends that cannot take a connection over.
var (
	errSubprotocol = errors.New("the backend chose another subprotocol than the client was told")
	errNotUpgraded = errors.New("the backend did not accept the connection")
)

// Search implements session.Route.
func (l *line) Search(i session.Interruption) func(context.Context) (*session.Found, error) {
	why := pool.Resuming
	if i.Move {
		why = pool.Moving
	}
	redial := func() Config { return l.Redial(l.request, l.addresses, why, i.Upstream) }
	c, dials := redial(), 0
	return func(ctx context.Context) (*session.Found, error) {
		t := c.Next(ctx)
		if t == nil && !i.Move {
			c = redial() // all over again
			if t = c.Next(ctx); t == nil {
				return nil, ErrNoUpstream // for now
			}
		}
		if t == nil {
			return nil, session.ErrNoUpstream
		}
		dials++
		resume := fmt.Sprintf("attempt=%d, replayed=%d, cause=%d", dials, i.Replayed, i.Cause)
		found, err := l.reach(ctx, c, t, l.request.Redial(l.compression, resume), i.Suspect)
		if err != nil {
			l.rec.Route().Leave(t.Place)
			if e := c.Logger.Check(zap.DebugLevel, "upstream does not take the connection over"); e != nil {
				e.Write(zap.String("id", l.rec.ID()), zap.String("upstream", t.Place.Name()), zap.String("dial", t.Addr.Dial()),
					zap.Int("count", dials), zap.Error(err))
			}
		}
		return found, err
	}
}

// reach dials a target. One that may break it is alone with it, among its like.
func (l *line) reach(ctx context.Context, c Config, t *pool.Target, q *handshake.Request, suspect bool) (*session.Found, error) {
	if !suspect {
		return l.dial(ctx, c, t, q)
	}
	route := l.rec.Route()
	if err := route.Probation(ctx, t.Place); err != nil {
		return nil, err
	}
	found, err := l.dial(ctx, c, t, q)
	if err != nil {
		route.Acquitted(t.Place)
		return nil, err
	}
	found.Acquitted = func() { route.Acquitted(t.Place) }
	return found, nil
}

// dial dials a target when it is this connection's turn.
func (l *line) dial(ctx context.Context, c Config, t *pool.Target, q *handshake.Request) (*session.Found, error) {
	route := l.rec.Route()
	if err := route.Redial(ctx, t.Place, c.Concurrency); err != nil {
		return nil, err
	}
	defer route.Redialed(t.Place)
	a, err := c.ask(ctx, t, q)
	if err != nil {
		return nil, err
	}
	if err := l.agrees(a.res); err != nil {
		_ = a.conn.Close()
		return nil, err
	}
	return &session.Found{
		Peer: session.Peer{Conn: a.conn, Early: a.res.Early}, Upstream: t.Place, Dial: t.Addr.Dial(),
		Discard: func() {
			_ = a.conn.Close()
			route.Leave(t.Place)
		},
	}, nil
}

// agrees returns nil if a backend's answer is the one that the client was given, and
// a RefusedError if no backend is to be asked any more.
func (l *line) agrees(res *handshake.Response) error {
	switch {
	case !res.Upgraded && final(res.HTTP.StatusCode):
		return &session.RefusedError{Status: res.HTTP.StatusCode}
	case !res.Upgraded:
		return fmt.Errorf("%w: status %d", errNotUpgraded, res.HTTP.StatusCode)
	case res.Subprotocol != l.subprotocol:
		return fmt.Errorf("%w: %q", errSubprotocol, res.Subprotocol)
	default:
		return l.compression.Agrees(res.Compression)
	}
}

// final reports whether a refusal with this status is about the client, so that
// every backend would say the same.
func final(status int) bool {
	switch status {
	case http.StatusRequestTimeout, http.StatusMisdirectedRequest, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	default:
		return status >= 400 && status < 500
	}
}
