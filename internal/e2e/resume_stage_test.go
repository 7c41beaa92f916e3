// This file is the stage on which backends die while a client is served, and the ways
// to die.

package e2e

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/frame"
)

// How a backend dies.
const (
	byReset   = "RST"
	byFin     = "FIN"
	byGoodbye = "close frame" // 1012, and then what the kernel makes of what is unread
	// 1012, and it reads until it is answered: nothing is in doubt.
	byFarewell = "closing handshake"
)

// die ends a backend's connection.
func (c *rawConn) die(how string) {
	switch how {
	case byReset:
		c.reset()
	case byFin:
		_ = c.tcp().CloseWrite() // unread bytes would make a RST of a Close
		_, _ = io.Copy(io.Discard, c.br)
	case byGoodbye:
		_, _ = c.Write(frame.AppendClose(nil, 1012, "", false))
	}
	c.Close()
}

// stage has many plays before one Caddy. In each, the backend that accepts the client is
// to die, and another one takes over.
type stage struct {
	*proxy
	plays sync.Map // by number, in the query
	last  atomic.Int64
}

// play is what both backends do with a client.
type play interface {
	first(c *rawConn)
	second(c *rawConn, resume string)
}

// startStage runs Caddy before two backends, with a path for each set of options.
func startStage(t testing.TB, options map[string]string) *stage {
	t.Helper()
	s := new(stage)
	a, b := rawBackend(t, s.serve), rawBackend(t, s.serve)
	var site strings.Builder
	for path, o := range options {
		fmt.Fprintf(&site, "websocket_proxy /%s %s %s {\n name %s\n resume_interval 1ms 20ms\n %s\n}\n", path, a, b, path, o)
	}
	s.proxy = startCaddy(t, "", site.String())
	return s
}

func (s *stage) serve(r *http.Request, c *rawConn) {
	v, ok := s.plays.Load(r.URL.Query().Get("play"))
	if !ok || c.accept(r) != nil {
		return
	}
	if resume := r.Header.Get("Holdfast-Resume"); resume != "" {
		v.(play).second(c, resume)
	} else {
		v.(play).first(c)
	}
}

// enter opens a client for a play.
func (s *stage) enter(t testing.TB, path string, p play) *rawConn {
	t.Helper()
	id := strconv.FormatInt(s.last.Add(1), 10)
	s.plays.Store(id, p)
	_, c := rawRequest(t, s.addr, strings.Replace(rawUpgrade(s.addr, ""), "/chat?x=1", "/"+path+"?"+url.Values{"play": {id}}.Encode(), 1))
	return c
}

// together runs plays, some at a time.
func together[T any](plays []T, run func(T)) {
	var wg sync.WaitGroup
	next := make(chan T)
	for range 32 {
		wg.Go(func() {
			for p := range next {
				run(p)
			}
		})
	}
	for _, p := range plays {
		next <- p
	}
	close(next)
	wg.Wait()
}
