// This file holds openings without a handshake: those of passthrough connections.

package opening

import (
	"context"
	"fmt"
	"net"
	"time"

	"go.uber.org/zap"

	"github.com/holdfast-proxy/caddy-holdfast/internal/pool"
	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/sock"
	"github.com/holdfast-proxy/caddy-holdfast/internal/tunnel"
)

// watchAfter is how long an upstream is dialed before the client is watched meanwhile.
const watchAfter = 10 * time.Millisecond

// Connect tries upstreams until one accepts the connection. Meanwhile nobody reads
// the client; if it leaves, that is the opening's end.
func (o *Opening) Connect(c Config, client net.Conn) (net.Conn, error) {
	defer o.watch(client)()
	err := ErrNoUpstream
	for {
		t := c.Next(o.ctx)
		if t == nil {
			if o.ctx.Err() != nil {
				return nil, context.Cause(o.ctx)
			}
			return nil, err
		}
		o.rec.Attempt(t.Place, t.Addr.Dial(), time.Now().Add(c.DialTimeout))
		var conn net.Conn
		conn, err = c.connect(o.ctx, t)
		o.rec.Attempted()
		if err == nil {
			return conn, nil
		}
		if o.ctx.Err() != nil {
			return nil, context.Cause(o.ctx)
		}
		if l := c.Logger.Check(zap.DebugLevel, "upstream does not accept the connection"); l != nil {
			l.Write(zap.String("id", o.ID()), zap.String("upstream", t.Place.Name()), zap.String("dial", t.Addr.Dial()), zap.Error(err))
		}
	}
}

// connect dials an upstream and tells of it, unless it was given up.
func (c *Config) connect(ctx context.Context, t *pool.Target) (net.Conn, error) {
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, c.DialTimeout)
	defer cancel()
	conn, err := t.Dial(limited)
	if err != nil {
		err = fmt.Errorf("dialing %s: %w", t.Addr.Dial(), err)
	}
	if ctx.Err() == nil {
		c.Tried(t, time.Since(began), err)
	}
	return conn, err
}

// watch ends the opening when the client leaves, until it is stopped. Most upstreams
// answer before it begins, and spare it.
func (o *Opening) watch(client net.Conn) (stop func()) {
	ctx, cancel := context.WithCancel(o.ctx)
	done := make(chan struct{})
	watcher := time.AfterFunc(watchAfter, func() {
		defer close(done)
		switch info, gone := sock.Watch(ctx, client); {
		case gone && info.Reset:
			o.Fail(registry.Reset)
		case gone:
			o.Fail(registry.EOF)
		}
	})
	return func() {
		cancel()
		if !watcher.Stop() {
			<-done // what it sees later is for the tunnel to find
		}
	}
}

// Tunnel makes the tunnel of a connection that an upstream has accepted. It owns the
// record and both legs from then on, and is to be run. If the connection's end
// came first the backend is closed, and there is none.
func (o *Opening) Tunnel(route tunnel.Route, client, backend net.Conn, early []byte) *tunnel.Tunnel {
	if !o.rec.Open("") {
		_ = backend.Close()
		return nil
	}
	t := tunnel.New(o.rec, route, client, backend, early)
	o.handover(t)
	return t
}

// Fail ends an opening for a reason; the first one counts.
func (o *Opening) Fail(reason registry.Reason) { o.rec.Close(registry.Ending{Reason: reason}) }

// Record is the connection's record.
func (o *Opening) Record() *registry.Conn { return o.rec }
