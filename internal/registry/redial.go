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
	limit   int             // as the last caller had it
	waiting []chan struct{} // first come, first served; closed when it is their turn
}

// Redial waits until fewer than limit connections dial the upstream at once. The
// caller has a place in the upstream's count, so that the upstream exists, and
// calls Redialed after the dial. The last caller's limit counts for all: a reload
// has its effect at once.
func (t *Route) Redial(ctx context.Context, u *Upstream, limit int) error {
	turn := make(chan struct{})
	t.reg.mu.Lock()
	u.redials.limit = limit
	u.redials.waiting = append(u.redials.waiting, turn)
	u.redials.next()
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
	} else { // its turn came at the same time
		u.redials.now--
		u.redials.next()
	}
	return ctx.Err()
}

// Redialed ends what Redial allowed.
func (t *Route) Redialed(u *Upstream) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	u.redials.now--
	u.redials.next()
}

// next lets those dial whose turn it is. Registry.mu is held.
func (r *redials) next() {
	for r.now < r.limit && len(r.waiting) > 0 {
		close(r.waiting[0])
		r.waiting[0] = nil
		r.waiting = r.waiting[1:]
		r.now++
	}
}
