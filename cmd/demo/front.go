// This file holds the front: the small HTTP server, behind Caddy, that has
// the page and what the page asks the demo itself.
package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"
)

//go:embed index.html
var page []byte

// pagePolicy keeps the promise that the page needs nothing from outside, and
// lets no text of a message become script.
const pagePolicy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; " +
	"img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// downtime is how long a backend that the page restarts stays away: long enough
// to see what becomes of the connections meanwhile.
const downtime = 2 * time.Second

type front struct {
	children []*child
	listener net.Listener
	server   *http.Server
	done     chan struct{} // closed by serve

	// Cancelled by stop: a backend that is down then stays down.
	stopping context.Context
	cancel   context.CancelFunc

	mu         sync.Mutex // protects restarting, and orders restarts.Add before Wait
	restarting map[*child]bool
	restarts   sync.WaitGroup
}

// startFront serves on a free port until stop.
func startFront(children ...*child) (*front, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("serving the page: %w", err)
	}
	f := &front{children: children, listener: ln, done: make(chan struct{}), restarting: make(map[*child]bool)}
	f.stopping, f.cancel = context.WithCancel(context.Background())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", f.servePage)
	mux.HandleFunc("GET /backends", f.serveBackends)
	mux.Handle("POST /restart/{name}", http.NewCrossOriginProtection().Handler(http.HandlerFunc(f.serveRestart)))
	f.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go f.serve()
	return f, nil
}

// serve owns the listener; stop ends it, and it closes done.
func (f *front) serve() {
	defer close(f.done)
	if err := f.server.Serve(f.listener); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, "demo: serving the page:", err)
	}
}

// stop returns when no request is served and no backend restarted any more.
func (f *front) stop() {
	f.mu.Lock()
	f.cancel()
	f.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if f.server.Shutdown(ctx) != nil {
		_ = f.server.Close()
	}
	<-f.done
	f.restarts.Wait()
}

func (f *front) address() string {
	return f.listener.Addr().String()
}

func (f *front) servePage(w http.ResponseWriter, _ *http.Request) {
	header := w.Header()
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Security-Policy", pagePolicy)
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Cache-Control", "no-cache")
	_, _ = w.Write(page)
}

// serveBackends tells the names of the backends' addresses.
func (f *front) serveBackends(w http.ResponseWriter, _ *http.Request) {
	type entry struct {
		Name    string `json:"name"`
		Address string `json:"address"`
	}
	list := make([]entry, len(f.children))
	for i, c := range f.children {
		list[i] = entry{Name: c.name, Address: c.address()}
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

// serveRestart restarts a backend: how=kill gives it no chance to say goodbye,
// with how=stop it closes its WebSockets first. It answers when the backend is
// back, and brings it back also when the one who asked has left.
func (f *front) serveRestart(w http.ResponseWriter, r *http.Request) {
	i := slices.IndexFunc(f.children, func(c *child) bool { return c.name == r.PathValue("name") })
	if i < 0 {
		http.Error(w, "there is no such backend", http.StatusNotFound)
		return
	}
	c := f.children[i]
	var end func()
	switch how := r.URL.Query().Get("how"); how {
	case "kill":
		end = c.kill
	case "stop":
		end = c.stop
	default:
		http.Error(w, fmt.Sprintf("how must be kill or stop: %q", how), http.StatusBadRequest)
		return
	}
	if status, err := f.restart(c, end); err != nil {
		http.Error(w, err.Error(), status)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// restart returns an error with the HTTP status that suits it.
func (f *front) restart(c *child, end func()) (status int, err error) {
	f.mu.Lock()
	switch {
	case f.stopping.Err() != nil:
		f.mu.Unlock()
		return http.StatusServiceUnavailable, errors.New("the demo is stopping")
	case f.restarting[c]:
		f.mu.Unlock()
		return http.StatusConflict, fmt.Errorf("backend %s is being restarted already", c.name)
	}
	f.restarting[c] = true
	f.restarts.Add(1)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.restarting, c)
		f.mu.Unlock()
		f.restarts.Done()
	}()

	end()
	_ = c.wait() // how it ended is as was asked
	select {
	case <-time.After(downtime):
	case <-f.stopping.Done():
		return http.StatusServiceUnavailable, errors.New("the demo is stopping")
	}
	if err := c.start(); err != nil {
		return http.StatusInternalServerError, err
	}
	fmt.Fprintf(os.Stderr, "backend %s is back, process %d\n", c.name, c.pid())
	return http.StatusNoContent, nil
}
