// This file bounds how many connections dial one upstream at once after they lost
// their backend.

package registry

import (
	"container/list"
	"context"
)

// redials is an upstream's queue of connections that want to dial it again.
// Registry.mu guards it.
type redials struct {
	now     int       // dials under way
	limit   int       // as the last caller had it
	waiting list.List // of channels, closed when it is their turn: first come, first served
}

// Redial waits until fewer than limit connections dial the upstream at once. The
// caller has a place in the upstream's count, so that the upstream exists, and
// calls Redialed after the dial. The last caller's limit counts for all: a reload
// has its effect at once.
func (t *Route) Redial(ctx context.Context, u *Upstream, limit int) error {
	return t.takeTurn(ctx, &u.redials, limit)
}

// Redialed ends what Redial allowed.
func (t *Route) Redialed(u *Upstream) { t.endTurn(&u.redials) }

// Probation waits until no other connection is on probation with the upstream:
// one of whose messages may be what breaks backends is to meet the next one
// without others of which the same could be said. Acquitted ends it.
func (t *Route) Probation(ctx context.Context, u *Upstream) error {
	return t.takeTurn(ctx, &u.probation, 1)
}

// Acquitted ends what Probation allowed.
func (t *Route) Acquitted(u *Upstream) { t.endTurn(&u.probation) }

func (t *Route) takeTurn(ctx context.Context, r *redials, limit int) error {
	turn := make(chan struct{})
	t.reg.mu.Lock()
	r.limit = limit
	place := r.waiting.PushBack(turn)
	r.next()
	t.reg.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	select {
	case <-turn: // it came at the same time
		r.now--
		r.next()
	default:
		r.waiting.Remove(place)
	}
	return ctx.Err()
}

func (t *Route) endTurn(r *redials) {
	t.reg.mu.Lock()
	defer t.reg.mu.Unlock()
	r.now--
	r.next()
}

// next lets those go on whose turn it is. Registry.mu is held.
func (r *redials) next() {
	for r.now < r.limit && r.waiting.Len() > 0 {
		close(r.waiting.Remove(r.waiting.Front()).(chan struct{}))
		r.now++
	}
}
