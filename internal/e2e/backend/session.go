// This file holds what a backend does with its connections, whichever library they
// are of.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// peer is the other end of a WebSocket. One goroutine reads; any may write.
type peer interface {
	// read returns the next message, and answers pings while it waits for it.
	read() (binary bool, data []byte, err error)
	write(binary bool, data []byte) error
	// sendClose sends a close frame, after which nothing more is sent. The peer can
	// still be read, until its close frame has come.
	sendClose(code int, reason string) error
	// code is the peer's close code if a read failed with err because one came, or 1006.
	code(err error) int
	// drop closes the connection as it is.
	drop()
}

// backend is the handler.
type backend struct {
	settings
	record *record
	refuse atomic.Int64 // status, 0 to accept

	mu       sync.Mutex // protects the fields below, and orders running.Add before Wait
	stopping bool
	peers    map[peer]struct{}
	running  sync.WaitGroup // a request each
}

func newBackend(s settings, r *record) *backend {
	b := &backend{settings: s, record: r, peers: make(map[peer]struct{})}
	b.refuse.Store(int64(s.refuse))
	return b
}

func (b *backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	about := line{Conn: r.Header.Get("Holdfast-Connection"), Resume: r.Header.Get("Holdfast-Resume")}
	status := int(b.refuse.Load())
	b.mu.Lock()
	if b.stopping {
		status = http.StatusServiceUnavailable
	} else {
		b.running.Add(1)
		defer b.running.Done()
	}
	b.mu.Unlock()
	if status != 0 {
		about.Event, about.Code = "refused", status
		b.record.add(about)
		http.Error(w, http.StatusText(status), status)
		return
	}
	about.Event, about.Seq = "open", b.record.last.Add(1)
	b.record.add(about)
	accept := b.acceptCoder
	if b.stack == "gorilla" {
		accept = b.acceptGorilla
	}
	p, err := accept(w, r)
	if err != nil {
		log.Printf("accepting: %v", err) // and the peer was told
		return
	}
	about.Resume = ""
	b.run(p, r.URL.Query(), about)
}

// offered returns the subprotocols that a request offers.
func offered(r *http.Request) (names []string) {
	for _, list := range r.Header.Values("Sec-WebSocket-Protocol") {
		for name := range strings.SplitSeq(list, ",") {
			names = append(names, strings.TrimSpace(name))
		}
	}
	return names
}

// run reads and records until the peer has closed.
func (b *backend) run(p peer, query url.Values, about line) {
	defer p.drop()
	b.mu.Lock()
	b.peers[p] = struct{}{}
	if b.stopping {
		go b.goodbye(p)
	}
	b.mu.Unlock()
	defer b.forget(p)

	if rate, _ := strconv.Atoi(query.Get("stream")); rate > 0 {
		s := &streamer{prefix: fmt.Sprintf("%s %d", b.name, about.Seq), rate: rate, quit: make(chan struct{})}
		go s.run(p)
		defer close(s.quit)
	}
	echo := query.Get("echo") != ""
	for {
		binary, data, err := p.read()
		if err != nil {
			about.Event, about.Code = "closed", p.code(err)
			b.record.add(about)
			return
		}
		m := about
		if binary {
			m.Event, m.Binary = "binary", data
		} else {
			m.Event, m.Text = "text", string(data)
		}
		b.record.add(m)
		if !binary && b.poison != "" && string(data) == b.poison {
			log.Printf("poisoned")
			os.Exit(1)
		}
		if echo {
			_ = p.write(binary, data) // a peer that is gone is found by reading
		}
	}
}

func (b *backend) forget(p peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.peers, p)
}

// stop says goodbye to every peer and returns when all have closed, or after
// closeTimeout. Until then their messages are read and recorded as ever.
func (b *backend) stop(ln net.Listener) {
	_ = ln.Close()
	b.mu.Lock()
	b.stopping = true
	for p := range b.peers {
		go b.goodbye(p)
	}
	b.mu.Unlock()
	done := make(chan struct{})
	go b.await(done)
	select {
	case <-done:
	case <-time.After(closeTimeout):
		log.Print("peers have not closed in time")
	}
}

// goodbye sends a close frame. As a goroutine it ends when that is written, or with
// the process.
func (b *backend) goodbye(p peer) {
	if err := p.sendClose(b.termCode, "backend "+b.name+" is stopping"); err != nil {
		log.Printf("closing: %v", err)
	}
}

// await closes done when the last connection has ended. It ends then, or with the process.
func (b *backend) await(done chan<- struct{}) {
	b.running.Wait()
	close(done)
}

// streamer sends numbered messages to a peer.
type streamer struct {
	prefix string
	rate   int           // bytes per second
	quit   chan struct{} // closed when the connection has ended, or is about to
}

// streamInterval is what lies between two messages of a stream, at least.
const streamInterval = 20 * time.Millisecond

// run sends messages "<backend> <seq> <n>", n from 0, filled up with dots to what the
// rate asks for by then. It ends with quit, or when the peer takes no more.
func (s *streamer) run(p peer) {
	tick := time.NewTicker(streamInterval)
	defer tick.Stop()
	began, sent := time.Now(), 0
	for n := 0; ; {
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
		due := int(float64(s.rate)*time.Since(began).Seconds()) - sent
		text := fmt.Sprintf("%s %d", s.prefix, n)
		if due < len(text) {
			continue
		}
		text += strings.Repeat(".", due-len(text))
		if p.write(false, []byte(text)) != nil {
			return
		}
		sent += len(text)
		n++
	}
}
