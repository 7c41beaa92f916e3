// This file holds what a pool does in the background.

package pool

import (
	"context"
	"net/http"
	"sync"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/selection"
)

// follow asks the dynamic source again and again, tells what health checks have
// found, and has connections leave upstreams. It ends with ctx.
func (p *Pool) follow(ctx context.Context) {
	var tick <-chan time.Time
	if p.Dynamic != nil {
		ticker := time.NewTicker(followPeriod)
		defer ticker.Stop()
		tick = ticker.C
	}
	for asking := p.Dynamic != nil; ; {
		leaving := asking && p.refresh(ctx)
		if ctx.Err() != nil {
			return
		}
		found := p.changes.take()
		if leaving || p.failing.Swap(false) || p.LeaveUnhealthy && len(found) > 0 {
			p.Left(p.route)
		}
		for _, c := range found {
			p.Changed(c.upstream, c.healthy)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick:
			asking = true
		case <-p.kicked:
			asking = false
		}
	}
}

// followPeriod is how often a dynamic source is asked. Sources remember answers for
// as long as they are told to.
const followPeriod = time.Second

// request returns what a dynamic source is asked with when no client does.
func (p *Pool) request(ctx context.Context) *http.Request {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "/", http.NoBody)
	if err != nil {
		return nil // a constant URL is no error
	}
	return selection.Prepare(r, "", false)
}

// change is what a health check has found out.
type change struct {
	upstream string
	healthy  bool
}

// changes are those that follow has not told yet: who is told may do anything, also
// stop the pool, which waits for the checks that found them.
type changes struct {
	mu   sync.Mutex
	list []change
}

func (c *changes) add(one change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = append(c.list, one)
}

func (c *changes) take() []change {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := c.list
	c.list = nil
	return all
}
