// This file holds the pings that wait for their pongs.

package replay

import (
	"bytes"
	"slices"
)

// maxPings bounds the pings that wait, but for one of the proxy's own, for which there
// is always room. A client decides how many it sends.
const maxPings = 64

// Pings is the queue of pings written to a backend, the proxy's own and the
// client's, in order. A pong answers all up to its own: backends may answer
// several pings with the last one's pong (RFC 6455 §5.5.3). The zero value is
// ready.
type Pings struct {
	waiting []ping
}

type ping struct {
	payload []byte // not nil
	own     bool
	pos     uint64
}

// Match is what a pong answers.
type Match struct {
	Known   bool     // it answers a ping
	Own     bool     // which was the proxy's own
	Acked   uint64   // the position that it acknowledges
	Skipped [][]byte // payloads of the client's pings that it answers as well
}

// Sent adds a ping that is about to be written, at position pos of the client's
// data. It returns false if there is no room for one of the client's: it is not to be
// written, but to be answered by the proxy. An own one takes the place of the oldest
// own one then.
func (p *Pings) Sent(payload []byte, own bool, pos uint64) bool {
	if len(p.waiting) >= maxPings {
		if !own {
			return false
		}
		if oldest := slices.IndexFunc(p.waiting, func(sent ping) bool { return sent.own }); oldest >= 0 {
			p.waiting = slices.Delete(p.waiting, oldest, oldest+1)
		}
	}
	p.waiting = append(p.waiting, ping{append([]byte{}, payload...), own, pos})
	return true
}

// Pong finds the oldest ping with that payload. It and all before it leave the
// queue.
func (p *Pings) Pong(payload []byte) Match {
	for i, sent := range p.waiting {
		if !bytes.Equal(sent.payload, payload) {
			continue
		}
		m := Match{Known: true, Own: sent.own, Acked: sent.pos, Skipped: clients(p.waiting[:i])}
		p.remove(i + 1)
		return m
	}
	return Match{}
}

// Unanswered returns how many of the proxy's own pings wait.
func (p *Pings) Unanswered() (own int) {
	for _, sent := range p.waiting {
		if sent.own {
			own++
		}
	}
	return own
}

// Clients reports whether a ping of the client waits.
func (p *Pings) Clients() bool {
	return slices.ContainsFunc(p.waiting, func(sent ping) bool { return !sent.own })
}

// Lost empties the queue, because the backend is gone, and returns the payloads
// of the client's pings, to be answered by the proxy.
func (p *Pings) Lost() [][]byte {
	unanswered := clients(p.waiting)
	p.waiting = nil
	return unanswered
}

// remove drops the first n pings, and the memory of a queue that is empty.
func (p *Pings) remove(n int) {
	left := copy(p.waiting, p.waiting[n:])
	if left == 0 {
		p.waiting = nil
		return
	}
	clear(p.waiting[left:])
	p.waiting = p.waiting[:left]
}

func clients(pings []ping) (payloads [][]byte) {
	for _, sent := range pings {
		if !sent.own {
			payloads = append(payloads, sent.payload)
		}
	}
	return payloads
}
