// This file holds the pumps: each relays one way.

package tunnel

import (
	"errors"
	"io"
	"math"
	"os"
	"sync/atomic"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
)

// carrier takes bytes out of one leg and puts them into the other. It holds a
// pipe, or a buffer, while there are bytes on their way; while it waits for
// bytes it holds nothing.
type carrier interface {
	// fill waits for bytes and takes up to limit of them. It is called after what
	// was taken before was drained or dropped.
	fill(limit int) (n int, err error)
	// drain puts all of them into the other leg.
	drain() error
	// drop forgets what was taken.
	drop()
	// close gives back what the carrier holds.
	close()
}

// errOtherCarrier is the error of a fill that has taken nothing, and will not: the
// pump has to use a copier.
var errOtherCarrier = errors.New("the kernel cannot carry this")

// pump relays one way. It is the only one that reads from and writes to.
type pump struct {
	t        *Tunnel
	from, to *leg
	way      registry.Direction
	early    []byte
	carrier  carrier
	waiting  atomic.Int64 // since when to has no room; 0: it has
}

// outcome is why a pump has stopped relaying.
type outcome uint8

const (
	eof    outcome = iota // its leg has ended
	told                  // the end was decided, and all that was on its way is delivered
	broken                // a leg is
)

// run relays until nothing more is to be relayed. It owns one carrier.
func (p *pump) run() {
	p.carrier = newCarrier(p)
	switch p.relay() {
	case eof:
		if p.t.ended(p) {
			p.t.tell(p)
		}
	case told:
		p.t.tell(p)
		if p.t.lingers(p) {
			p.linger()
		}
	case broken: // who knows about it ends the tunnel
	}
	p.carrier.close()
}

func (p *pump) relay() outcome {
	if len(p.early) > 0 && !p.sendEarly() {
		return broken
	}
	limit, last := math.MaxInt, false
	for {
		if !last && p.t.ending.Load() {
			limit, last = p.t.lastBytes(p), true
		}
		if limit == 0 {
			return told
		}
		n, err := p.fill(limit)
		if n > 0 {
			if last {
				limit -= n
			}
			p.count(n)
			if err := p.carrier.drain(); err != nil {
				p.t.broke(p.to, err)
				return broken
			}
		}
		switch {
		case err == nil:
		case err == io.EOF:
			return eof
		case errors.Is(err, os.ErrDeadlineExceeded):
			if last {
				return told
			}
			if !p.t.ending.Load() {
				_ = p.from.conn.SetReadDeadline(time.Time{}) // somebody else's
			}
		default:
			p.t.broke(p.from, err)
			return broken
		}
	}
}

// fill has the carrier take bytes or, once, has another one do so from now on.
func (p *pump) fill(limit int) (int, error) {
	n, err := p.carrier.fill(limit)
	if err == errOtherCarrier {
		p.carrier.close()
		p.carrier = newCopier(p)
		return 0, nil
	}
	return n, err
}

// sendEarly writes what was read before there was a tunnel, and lets go of it.
func (p *pump) sendEarly() bool {
	b := p.early
	p.early = nil
	p.count(len(b))
	if err := p.write(b); err != nil {
		p.t.broke(p.to, err)
		return false
	}
	return true
}

// linger throws away what comes, until the peer ends or is given up.
func (p *pump) linger() {
	for {
		if _, err := p.fill(math.MaxInt); err != nil {
			return
		}
		p.carrier.drop()
	}
}

// count counts bytes before they are written, so that who sees them finds them
// counted.
func (p *pump) count(n int) {
	p.t.rec.Count(p.way, n, 0)
	switch pending := p.t.pending.Load(); {
	case p.way == registry.Out && pending != 0:
		p.t.pending.Store(0)
	case p.way == registry.In && pending == 0:
		p.t.pending.Store(int64(p.t.now()))
	}
}

// write writes all of b.
func (p *pump) write(b []byte) error {
	p.waits()
	_, err := p.to.conn.Write(b)
	p.goesOn()
	return err
}

// waits notes that there is, or may be, no room for what is to be written: from
// now on nobody reads the pump's leg, and the clock has to look at it.
func (p *pump) waits() {
	p.waiting.Store(int64(p.t.now()))
	if p.t.drowsy.Load() {
		p.t.rouse()
	}
}

func (p *pump) goesOn() { p.waiting.Store(0) }
