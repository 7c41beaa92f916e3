// This file keeps connections in the order of their age and goes through them.

package registry

import (
	"sort"
	"time"
)

// Whoever goes through many connections lets others have the lock after atOnce of them.
// Where nobody waits for the result but an operator, there is a rest after restAfter of
// work as well, so that others have the processor. Yielding would not do: while anything
// can run, Go's scheduler hardly asks for what has arrived at sockets.
const (
	atOnce    = 1000
	restAfter = 150 * time.Microsecond
	rest      = 200 * time.Microsecond // a millisecond, as timers go
)

// work is a long piece of work that is to have rests.
type work struct{ began time.Time }

func begin() work { return work{time.Now()} }

// rest rests if it is time to.
func (w *work) rest() {
	if time.Since(w.began) >= restAfter {
		time.Sleep(rest)
		w.began = time.Now()
	}
}

// byAge are connections in the order of their age, which is that of their IDs.
// Registry.mu guards them.
type byAge struct {
	slots []slot
	dead  int // empty slots
}

// slot keeps a connection's place. It is empty once that is gone; its id stays, so
// that a page can go on after it.
type slot struct {
	id   string
	conn *Conn
}

// add adds a connection that is younger than all others.
func (o *byAge) add(c *Conn) { o.slots = append(o.slots, slot{c.id, c}) }

func (o *byAge) remove(c *Conn) {
	o.slots[o.after(c.id)-1].conn = nil
	o.dead++
	if o.dead > len(o.slots)/2+32 {
		o.compact()
	}
}

// after returns the index of the first slot younger than id.
func (o *byAge) after(id string) int {
	return sort.Search(len(o.slots), func(i int) bool { return o.slots[i].id > id })
}

// compact drops the empty slots; as many ended as are left, so its cost is
// spread over them.
func (o *byAge) compact() {
	live := len(o.slots) - o.dead
	kept := make([]slot, 0, 2*live+64)
	for _, s := range o.slots {
		if s.conn != nil {
			kept = append(kept, s)
		}
	}
	o.slots, o.dead = kept, 0
}

// live returns those of the connections that are there now.
func (r *Registry) live(of *byAge) (conns []*Conn) {
	r.scan(of, "", func(c *Conn) bool {
		conns = append(conns, c)
		return true
	})
	return conns
}

// scan calls f for each of the connections that is younger than the one with the id
// after, in order of age, until f returns false. mu is held during each call, but not all
// the time: one that comes or goes meanwhile may be seen or not.
func (r *Registry) scan(of *byAge, after string, f func(c *Conn) (more bool)) {
	for more := true; more; {
		after, more = r.scanSome(of, after, f)
	}
}

// survey is scan with rests.
func (r *Registry) survey(of *byAge, after string, f func(c *Conn) (more bool)) {
	w := begin()
	for more := true; more; w.rest() {
		after, more = r.scanSome(of, after, f)
	}
}

// scanSome is scan for atOnce slots. It returns the id to go on after, and whether there
// is more.
func (r *Registry) scanSome(of *byAge, after string, f func(c *Conn) (more bool)) (last string, more bool) {
	r.mu.Lock()
	defer r.unlock()
	from := of.after(after)
	some := of.slots[from:min(from+atOnce, len(of.slots))]
	more = from+len(some) < len(of.slots) // f may drop empty slots
	for _, s := range some {
		if s.conn != nil && !f(s.conn) {
			return "", false
		}
	}
	if more {
		last = some[len(some)-1].id
	}
	return last, more
}
