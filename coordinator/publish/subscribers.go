package publish

import "sync"

// everyone is the key of those who want to hear of each publication. It is no node's name.
const everyone = ""

// subscribers are woken by one-slot channels: who is slow finds one wake-up, and reads the latest.
type subscribers struct {
	mu     sync.Mutex
	byNode map[string]map[chan struct{}]struct{}
}

func (s *subscribers) add(node string) (<-chan struct{}, func()) {
	ch := make(chan struct{}, 1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byNode[node] == nil {
		s.byNode[node] = map[chan struct{}]struct{}{}
	}
	s.byNode[node][ch] = struct{}{}
	return ch, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.byNode[node], ch)
		if len(s.byNode[node]) == 0 {
			delete(s.byNode, node)
		}
	}
}

func (s *subscribers) wake(nodes []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range nodes {
		s.wakeLocked(n)
	}
	s.wakeLocked(everyone)
}

func (s *subscribers) wakeLocked(node string) {
	for ch := range s.byNode[node] {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}
