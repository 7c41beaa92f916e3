// This file has an upstream that answers probes by a script, and who is told.

package health

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

var errDown = errors.New("connection refused")

// prober is an upstream that answers probes by a script, and notes when they begin.
type prober struct {
	start time.Time
	takes time.Duration // each probe; it is over at once when ctx is done

	mu       sync.Mutex
	down     bool
	begun    []time.Duration // since start
	canceled int
	running  int
	most     int // probes at once
}

func newProber() *prober { return &prober{start: time.Now()} }

func (p *prober) probe(ctx context.Context) error {
	p.mu.Lock()
	p.begun = append(p.begun, time.Since(p.start))
	p.running++
	p.most = max(p.most, p.running)
	takes := p.takes
	p.mu.Unlock()
	var err error
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running--
	if errors.Is(err, context.Canceled) {
		p.canceled++
	}
	if err == nil && p.down {
		err = errDown
	}
	return err
}

func (p *prober) setDown(down bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = down
}

// begins returns when the probes began, and their number.
func (p *prober) begins() ([]time.Duration, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.begun), len(p.begun)
}

// spec is of checks every 10 to 9 s that take 3 s at most.
func (p *prober) spec() Spec {
	return Spec{
		Interval: 10 * time.Second, Timeout: 3 * time.Second, Fails: 1, Passes: 1,
		Probe: p.probe, Logger: zap.NewNop(), Upstream: "app:8080",
	}
}

// told keeps what a notify was told.
type told struct {
	mu  sync.Mutex
	all []bool
}

func (n *told) notify(healthy bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, healthy)
}

func (n *told) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return fmt.Sprint(n.all)
}

// pass lets time pass, and whatever happens in it happen.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// leftovers checks that nothing is left when all Watches have stopped.
func leftovers(t *testing.T, c *Checkers) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.checkers) != 0 {
		t.Errorf("got %d keys left, want none", len(c.checkers))
	}
}
