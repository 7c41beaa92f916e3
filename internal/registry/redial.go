// This file bounds how many connections dial one upstream at once after they lost
// their backend.

package registry

import (
	"context"
	"slices"
)

// redials is an upstream's queue of connections that want to dial it again.
// Registry.mu guards it.
type redials struct {
	now     int             // dials under way
	waiting []chan struct{} // first come, first served; closed when it is their turn
}

// Redial waits until fewer than limit connections dial the upstream at once. The
// caller has a place in the upstream's count, so that the upstream exists, and
// calls Redialed after the dial. Limits of later callers may differ: a reload
// counts at once.
func (t *Route) Redial(ctx context.Context, u *Upstream, limit int) error {
	t.reg.mu.Lock()
	if u.redials.now < limit {
		u.redials.now++
		t.reg.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	u.redials.waiting = append(u.redials.waiting, turn)
	t.reg.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	if i := slices.Index(u.redials.waiting, turn); i >= 0 {
		u.redials.waiting = slices.Delete(u.redials.waiting, i, i+1)
	} else {
		u.redials.next() // its turn came at the same time
	}
	return ctx.Err()
}

// Redialed ends what Redial allowed.
func (t *Route) Redialed(u *Upstream) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	u.redials.next()
}

// next hands a finished dial's turn on. Registry.mu is held.
func (r *redials) next() {
	if len(r.waiting) == 0 {
		r.now--
		return
	}
	close(r.waiting[0])
	r.waiting = r.waiting[1:]
}
